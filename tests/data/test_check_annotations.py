import json
import logging
import os
from importlib import import_module

import numpy as np
import pytest
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from panet_d2.data import NamedImageMapper, check_annotations, setup_datasets
from panet_d2.errors import DataError

from ..common import tiny_cfg, write_coco

MODULE = import_module("panet_d2.data.check_annotations")  # the package has a function of that name
NAN = float("nan")
INF = float("inf")
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
INNER = [15, 15, 25, 15, 25, 25, 15, 25]
WHOLE = [[0, 9, 31, 9, 31, 64, 0, 64]]


class Squares:
    """
    The data set of write_coco: four images of 64x96 with two objects each, whose annotations have
    the ids 1 to 8.
    """

    def __init__(self, folder):
        self.json_file, self.root = write_coco(folder / "squares")
        with open(self.json_file) as f:
            self.content = json.load(f)

    def annotation(self, index, **changes):
        """Change an annotation; what is None is removed. A new mask gets a box that fits."""
        annotation = {**self.content["annotations"][index], **changes}
        annotation = {k: v for k, v in annotation.items() if v is not None}
        self.content["annotations"][index] = annotation

    def image(self, index, **changes):
        self.content["images"][index].update(changes)
        return os.path.join(self.root, self.content["images"][index]["file_name"])

    def config(self, *opts):
        """With what is in ``content`` as training data."""
        with open(self.json_file, "w") as f:
            json.dump(self.content, f)
        entry = ["checked_squares", self.json_file, self.root]
        opts = ("DATASETS.TRAIN", ["checked_squares"], "INPUT.RANDOM_FLIP", "none", *opts)
        return tiny_cfg("DATASETS.REGISTER_COCO", [entry], *opts)


@pytest.fixture
def squares(tmp_path):
    return Squares(tmp_path)


def tight_box(segmentation):
    """The box of a valid mask, as COCO has it."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    return mask_util.toBbox(segmentation).tolist()


def brief(problems):
    return [(p.severity, p.where, p.what) for p in problems]


def rle(counts, size=(64, 96)):
    return {"size": list(size), "counts": counts}


def compressed(counts, size=(64, 96)):
    encoded = mask_util.frPyObjects(rle(counts), *size)
    return {"size": list(size), "counts": encoded["counts"].decode()}


BROKEN_ANNOTATIONS = {
    "unknown image": dict(image_id=99),
    "unknown category": dict(category_id=99),
    "annotation id occurs more than once": dict(id=3),
    "'ignore' is set": dict(ignore=1),
    "'iscrowd' is neither 0 nor 1": dict(iscrowd="no"),
    "box is not four numbers": dict(bbox=[NAN, 2, 24, 24]),
    "box is not four numbers 2": dict(bbox=[2, 2, float("inf"), 24]),
    "box is not four numbers 3": dict(bbox=[]),
    "box is not four numbers 4": dict(bbox=None),
    "box is not four numbers 5": dict(bbox=[2, 2, "24", 24]),
    "box of negative size": dict(bbox=[30, 30, -24, 24]),
    "has no mask": dict(segmentation=None),
    "mask is neither polygons nor RLE": dict(segmentation="mask"),
    "RLE of another size than the image": dict(segmentation=compressed([0, 128 * 96], (128, 96))),
    "malformed RLE": dict(segmentation=rle("hello world")),
    "malformed RLE not ASCII": dict(segmentation=rle("é")),
    "malformed RLE unfinished": dict(segmentation=rle(compressed([0, 6144])["counts"][:-1])),
    "malformed RLE empty": dict(segmentation=rle("")),
    "malformed RLE too short": dict(segmentation=compressed([100, 20, 6000])),
    "malformed RLE too long": dict(segmentation=compressed([100, 20, 6025])),
    "malformed RLE object too short": dict(segmentation=compressed([100, 6000])),
    "malformed RLE list": dict(segmentation=rle([100, 20, 6000])),
    "malformed RLE negative": dict(segmentation=rle([-100, 6244])),
    "malformed RLE fractions": dict(segmentation=rle([100.5, 6043.5])),
    "malformed RLE without counts": dict(segmentation={"size": [64, 96]}),
    "mask is empty": dict(segmentation=compressed([6144])),
    "mask is empty list": dict(segmentation=rle([6144])),
    "mask is empty polygon": dict(segmentation=[[10, 10, 20.1, 20.1, 30.3, 30.3]]),
    "polygon is not a list of numbers": dict(segmentation=SQUARE),
    "polygon is not a list of numbers 2": dict(segmentation=[[10, NAN, 30, 10, 30, 30]]),
    "polygon is not a list of numbers 3": dict(segmentation=[[10, 1e9, 30, 10, 30, 30]]),
    "polygon with an odd number of coordinates": dict(segmentation=[SQUARE, SQUARE[:7]]),
    "polygon of fewer than three points": dict(segmentation=[SQUARE[:4]]),
    "mask is outside the image": dict(segmentation=[[110, 10, 130, 10, 130, 30]]),
    "mask is outside the image 2": dict(segmentation=[[10, -30, 30, -30, 30, 0]]),
}


@pytest.mark.parametrize("what", BROKEN_ANNOTATIONS)
def test_broken_annotations_are_refused(squares, what):
    squares.annotation(4, **BROKEN_ANNOTATIONS[what])
    problems = check_annotations(squares.content)
    assert {p.severity for p in problems} >= {"error"}
    [error] = [p for p in problems if p.severity == "error"]
    assert what.startswith(error.what)
    name = f"annotation {squares.content['annotations'][4]['id']} "
    assert error.where.startswith(name)
    with pytest.raises(DataError, match=f"{squares.json_file} cannot be used: {name}.*check_data"):
        setup_datasets(squares.config())


def test_masks_that_are_not_used_may_be_missing(squares):
    squares.annotation(4, segmentation=None)
    setup_datasets(squares.config("MODEL.MASK_ON", False))
    assert check_annotations(squares.content, masks=False) == []


@pytest.mark.parametrize("what", [w for w in BROKEN_ANNOTATIONS if w.startswith("malformed RLE")])
def test_pycocotools_gets_no_text_that_it_would_read_past(squares, what, monkeypatch):
    squares.annotation(4, **BROKEN_ANNOTATIONS[what])
    squares.content["annotations"] = squares.content["annotations"][4:5]
    given = []
    to_bbox = mask_util.toBbox
    monkeypatch.setattr(mask_util, "toBbox", lambda x: given.append(x["counts"]) or to_bbox(x))
    check_annotations(squares.content)
    # What else is wrong with numbers that are whole is safe to find out.
    assert bool(given) == (" too " in what)


@pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [96, 5, 9, 9]])
@pytest.mark.parametrize(
    "segmentation", [compressed([6144]), [[110, 10, 130, 10, 130, 30]], [SQUARE[:4]]]
)
def test_nothing_to_see_needs_no_mask(squares, bbox, segmentation):
    """An annotation that is left out for its box may have a mask of nothing."""
    squares.annotation(4, bbox=bbox, segmentation=segmentation)
    problems = check_annotations(squares.content, evaluated=False)
    assert {p.severity for p in problems} == {"warning"}


def test_an_outline_may_cross_itself(squares):
    outline = [[10, 10, 30, 30, 30, 10, 10, 30]]
    squares.annotation(4, segmentation=outline, bbox=tight_box(outline))
    assert check_annotations(squares.content) == []


@pytest.mark.parametrize("seed", range(5))
def test_whole_rle_is_none(squares, seed):
    """Also with one pixel, runs of any length, and the object at either end."""
    rng = np.random.default_rng(seed)
    for probability in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = (rng.random((64, 96)) < probability).astype(np.uint8)
        mask[rng.integers(64), rng.integers(96)] = 1
        encoded = mask_util.encode(np.asfortranarray(mask))
        box = mask_util.toBbox(encoded).tolist()
        squares.annotation(4, segmentation=rle(encoded["counts"].decode()), bbox=box)
        assert check_annotations(squares.content) == []
        runs = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=0, append=2))
        runs = np.diff(runs, prepend=0).tolist()
        squares.annotation(4, segmentation=rle(runs))
        assert check_annotations(squares.content) == []
        for change in (-1, 1):
            squares.annotation(4, segmentation=compressed([*runs[:-1], runs[-1] + change]))
            assert [p.what for p in check_annotations(squares.content)] == ["malformed RLE"]


BROKEN_LISTS = {
    "image id occurs more than once": lambda s: s.image(2, id=4),
    "has no file name": lambda s: s.content["images"][2].pop("file_name"),
    "has no size": lambda s: s.image(2, height=None),
    "has no size 2": lambda s: s.image(2, width=0),
    "has no id": lambda s: s.content["images"].append({"file_name": "003.png"}),
    "has no id 2": lambda s: s.annotation(2, id=None),
    "is not a record": lambda s: s.content["annotations"].append("annotation"),
    "category id occurs more than once": lambda s: s.content["categories"].append(
        {"id": 3, "name": "again"}
    ),
}


@pytest.mark.parametrize("what", BROKEN_LISTS)
def test_broken_records_are_refused(squares, what):
    BROKEN_LISTS[what](squares)
    errors = [p for p in check_annotations(squares.content) if p.severity == "error"]
    assert any(what.startswith(p.what) for p in errors)
    with pytest.raises(DataError, match=f"{squares.json_file} cannot be used"):
        setup_datasets(squares.config())


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_of_two_kinds_have_no_order(squares, kind):
    key = {"images": "image_id", "categories": "category_id"}[kind]
    changed = squares.content[kind][0]["id"]
    squares.content[kind][0]["id"] = "first"
    for annotation in squares.content["annotations"]:
        if annotation[key] == changed:
            annotation[key] = "first"
    [problem] = check_annotations(squares.content)
    assert (problem.severity, problem.what) == ("error", "ids are partly numbers, partly text")
    with pytest.raises(DataError, match=f"{squares.json_file}"):
        setup_datasets(squares.config())


def test_category_without_a_name(squares):
    del squares.content["categories"][1]["name"]
    assert brief(check_annotations(squares.content)) == [("error", "category 2", "has no name")]
    with pytest.raises(
        DataError, match=f"{squares.json_file} cannot be used: category 2: has no name"
    ):
        setup_datasets(squares.config())


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(id=0), "annotation id is 0"),
        (dict(id="five"), "annotation id is not a number"),
        (dict(area=None), "has no area"),
        (dict(iscrowd=None), "has no iscrowd"),
    ],
)
def test_what_evaluation_needs(squares, change, what):
    """Training does not, so that only test sets are refused."""
    squares.annotation(4, **change)
    assert [(p.severity, p.what) for p in check_annotations(squares.content)] == [("error", what)]
    problems = check_annotations(squares.content, evaluated=False)
    assert all(p.severity == "warning" for p in problems)
    cfg = squares.config()
    setup_datasets(cfg)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    with pytest.raises(DataError, match=what):
        setup_datasets(cfg)
    with pytest.raises(DataError, match=what):
        setup_datasets(cfg, needed=("TEST",))


def test_message_names_the_first_and_counts_the_others(squares):
    for index in range(5):
        squares.annotation(index, category_id=99)
    with pytest.raises(DataError, match="annotation 1 .*annotation 3 .*and 2 more") as e:
        setup_datasets(squares.config())
    assert "annotation 4 " not in str(e.value)


def _polygons(squares):
    for index, annotation in enumerate(squares.content["annotations"]):
        x, y, w, h = annotation["bbox"]
        squares.annotation(index, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])


def _crowded(squares):
    first = squares.content["annotations"][0]
    x, *others = first["bbox"]
    many = [
        {**first, "id": 100 + i, "image_id": 4, "bbox": [x + i / 1e4, *others]} for i in range(1200)
    ]
    squares.content["annotations"] += many


# What training copes with, the warning for it, and the objects that are left in each image.
PARTLY_WRONG = {
    "box of no area": (lambda s: s.annotation(6, bbox=[9, 9, 0, 9]), [2, 2, 2, 1]),
    "box is outside the image": (lambda s: s.annotation(6, bbox=[96, 9, 9, 9]), [2, 2, 2, 1]),
    "box is partly outside the image": (
        lambda s: s.annotation(6, bbox=[-9, 9, 40, 99], segmentation=WHOLE),
        [2, 2, 2, 2],
    ),
    "box is partly outside the image below": (
        lambda s: s.annotation(
            6, bbox=[9, 40, 24, 26], segmentation=[[9, 40, 33, 40, 33, 64, 9, 64]]
        ),
        [2, 2, 2, 2],
    ),
    "mask is partly outside the image": (
        lambda s: s.annotation(6, bbox=[0, 9, 30, 21], segmentation=[[-9, 9, 30, 9, 30, 30]]),
        [2, 2, 2, 2],
    ),
    "polygon of fewer than three points": (
        lambda s: s.annotation(6, bbox=[10, 10, 20, 20], segmentation=[SQUARE, SQUARE[:4]]),
        [2, 2, 2, 2],
    ),
    "has no annotations": (lambda s: s.content["annotations"].__delitem__(slice(6, 8)), [2, 2, 2]),
    "annotation id is 0": (lambda s: s.annotation(6, id=0), [2, 2, 2, 2]),
    "polygon inside another of its mask": (
        lambda s: s.annotation(6, bbox=[10, 10, 20, 20], segmentation=[SQUARE, INNER]),
        [2, 2, 2, 2],
    ),
    "same object as another annotation": (
        lambda s: s.content["annotations"].append({**s.content["annotations"][6], "id": 99}),
        [2, 2, 2, 3],
    ),
    "many are crowds": (lambda s: s.annotation(6, iscrowd=1), [2, 2, 2, 1]),
    "has more than 1000 annotations": (_crowded, [2, 2, 2, 1202]),
    "file is listed more than once": (
        lambda s: s.image(1, file_name="001.png"),
        [2, 2, 2, 2],
    ),
}


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("what", PARTLY_WRONG)
def test_training_copes(squares, what, mask_format):
    change, counts = PARTLY_WRONG[what]
    _polygons(squares)
    change(squares)
    problems = check_annotations(squares.content, evaluated=False)
    assert [(p.severity, p.what) for p in problems] == [("warning", what.replace(" below", ""))]

    cfg = squares.config("INPUT.MASK_FORMAT", mask_format)
    setup_datasets(cfg)
    inputs = _loaded(cfg, len(counts))
    assert [len(x["instances"]) for x in inputs] == counts
    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor
        assert (
            boxes.min() >= 0 and (boxes.max(dim=0).values[2:] <= boxes.new_tensor([96, 64])).all()
        )
    _train(cfg, inputs[-1:])


def test_images_without_annotations_train_as_negatives(squares):
    del squares.content["annotations"][6:]
    cfg = squares.config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    setup_datasets(cfg)
    inputs = _loaded(cfg, 4)
    assert [len(x["instances"]) for x in inputs] == [2, 2, 2, 0]
    _train(cfg, inputs[-1:])
    _train(cfg, inputs[-2:])


def _loaded(cfg, count):
    """What the training loader gives, in the order of the images' ids."""
    opts = ["SOLVER.IMS_PER_BATCH", 1, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    cfg.merge_from_list(opts)
    loader = iter(build_detection_train_loader(cfg, mapper=NamedImageMapper(cfg, True)))
    inputs = [next(loader)[0] for _ in range(count)]
    assert len({x["image_id"] for x in inputs}) == count
    return sorted(inputs, key=lambda x: x["image_id"])


def _train(cfg, inputs):
    model = build_model(cfg)
    with EventStorage():
        losses = model(inputs)
    assert len(losses) == 5 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# The fast pass must find nothing where the exact check finds something, whatever a file holds.

ODD = [
    *(None, True, False, 0, 1, 2, -1, -1.5, 1.0, 0.5, NAN, INF, -INF, 10**400, -(10**400), 1e6),
    *(999_999, "", "1", "one", [], [[]], [1], {}, {"size": [64, 96]}, (1, 2)),
    *(np.float32(3), np.float64(3), np.int64(3)),
]
SIZES = [(64, 96), (480, 640), (1, 1), (2, 600_000), (64, None), (True, 96), ("64", "96")]


def _outline(rng, height, width):
    """A polygon of an object that is inside the image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    center = np.array([width, height]) / 2
    points = center + around * center * rng.uniform(0.2, 1.01)
    points = points.round(int(rng.integers(0, 3)))
    return points.astype(int).ravel().tolist() if rng.random() < 0.3 else points.ravel().tolist()


def _segmentation(rng, height, width):
    if rng.random() < 0.6:
        return [_outline(rng, height, width) for _ in range(rng.integers(1, 4))]
    first = int(rng.integers(height * width))
    runs = [first, int(rng.integers(1, height * width - first + 1))]
    runs.append(height * width - sum(runs))
    if rng.random() < 0.5:
        return rle(runs, (height, width))
    return compressed(runs, (height, width))


def _random_content(rng, count):
    """Valid annotations, but for some images without a usable size."""
    images, annotations = [], []
    for number in range(1, 9):
        height, width = SIZES[rng.integers(len(SIZES))] if rng.random() < 0.3 else (64, 96)
        images.append({"id": number, "file_name": f"{number}.png"})
        images[-1].update(height=height, width=width)
    for number in range(1, count + 1):
        image = images[rng.integers(len(images))]
        sides = image["height"], image["width"]
        height, width = sides if [type(s) for s in sides] == [int, int] else (64, 96)
        annotation = {
            **{"id": number, "image_id": image["id"], "category_id": int(rng.integers(1, 4))},
            **{"area": float(rng.uniform(1, 99)), "iscrowd": int(rng.random() < 0.2)},
            "segmentation": _segmentation(rng, height, width),
            **{"keypoints": [1, 2.5, 2, 3, 4, 1], "num_keypoints": 2},
        }
        annotation["bbox"] = tight_box(annotation["segmentation"])
        annotations.append(annotation)
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _lists(value):
    """All lists in a value, whatever it is."""
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, list):
        yield value
    for inner in value if isinstance(value, list) else ():
        yield from _lists(inner)


def _damage(rng, annotation):
    keys = [*annotation, "ignore"]
    key, odd = keys[rng.integers(len(keys))], ODD[rng.integers(len(ODD))]
    kind = rng.integers(8)
    lists = [x for x in _lists(annotation) if x]
    numbers = [x for x in lists if type(x[0]) in (int, float)]
    segmentation = annotation.get("segmentation")
    if kind == 0:
        annotation[key] = odd
    elif kind == 1:
        annotation.pop(key, None)
    elif kind == 2 and lists:
        values = lists[rng.integers(len(lists))]
        values[rng.integers(len(values))] = odd
    elif kind == 3 and lists:
        lists[rng.integers(len(lists))].pop()
    elif kind == 4 and numbers:  # moved, perhaps by a little
        values = numbers[rng.integers(len(numbers))]
        by = float(rng.choice([-1e7, -100, -1.01, -1, -0.99, 0.99, 1, 1.01, 100, 1e7]))
        values[:] = [v + by if type(v) in (int, float) and abs(v) < 1e9 else v for v in values]
    elif kind == 5 and numbers:  # all points in one line, or nearly so
        values = numbers[rng.integers(len(numbers))]
        values[:] = [7 + i // 2 * float(rng.choice([1, 0.1, 0.3])) for i in range(len(values))]
    elif kind == 6 and numbers:
        values = numbers[rng.integers(len(numbers))]
        values[:] = values[:2] * (len(values) // 2)
    elif kind == 7 and isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            cut = rng.integers(len(counts) + 1)
            segmentation["counts"] = counts[:cut] + "1PoO0é"[: rng.integers(6)] + counts[cut:]


def _found(content, fast, **options):
    """The problems, and how many annotations took the exact check."""
    exact, checked = MODULE._annotation_problems, []
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setattr(MODULE, "_is_fine", lambda *args: False)
        patch.setattr(
            MODULE, "_annotation_problems", lambda *args: checked.append(1) or exact(*args)
        )
        return check_annotations(content, **options), len(checked)


@pytest.mark.parametrize("seed", range(20))
def test_fast_finds_what_slow_finds(seed):
    rng = np.random.default_rng(seed)
    content = _random_content(rng, 100)
    for annotation in content["annotations"]:
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            _damage(rng, annotation)
    content["annotations"] += [None, "annotation", []]
    for masks in (None, True, False):
        for evaluated, keypoints in ((True, 0), (False, 2)):
            options = dict(masks=masks, evaluated=evaluated, keypoints=keypoints)
            (fast, few), (slow, every) = (_found(content, x, **options) for x in (True, False))
            assert fast == slow
            assert few < every and len(slow) > 50


def test_fast_finds_what_slow_finds_at_the_edges(squares):
    """Objects across each of an image's edges, near the tolerance and near the limit."""
    image, example = squares.content["images"][0], squares.content["annotations"][0]
    squares.content["images"] = [image, {**image, "id": 2, "height": 2, "width": 2_000_000}]
    squares.content["annotations"] = annotations = []
    for number, side in ((1, 96), (1, 64), (2, 2_000_000)):
        for start in (-30, -1.01, -1, 0, side / 2, side - 0.5, side, side + 0.5):
            for end in (-0.5, 0, 0.5, side / 2, side - 0.5, side + 1, side + 1.01, side + 30):
                low, high = ((start, 0), (end, 2)) if side != 64 else ((0, start), (2, end))
                box = [*low, high[0] - low[0], high[1] - low[1]]
                polygon = [*low, high[0], low[1], *high, low[0], high[1]]
                for changes in ({"bbox": box}, {"segmentation": [polygon]}):
                    ids = {"id": len(annotations) + 1, "image_id": number}
                    annotations.append({**example, "bbox": [0, 0, 2, 2], **ids, **changes})
    (fast, few), (slow, every) = (_found(squares.content, x) for x in (True, False))
    assert fast == slow
    assert few < every and {p.severity for p in slow} == {"error", "warning"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text("sc"), inner, max_size=2),
    max_leaves=12,
)
NUMBER = st.integers(-3, 100) | st.floats(-3, 100) | st.sampled_from([NAN, INF, -INF, 1e6, 10**400])
POLYGON = st.lists(NUMBER, min_size=4, max_size=12)
RLE = st.builds(rle, st.lists(st.integers(-1, 6144)) | st.text("0123456789OPQo"))


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {"image_id": st.sampled_from([1, 4, True]) | JSON, "category_id": st.just(1) | JSON},
        optional={
            "id": st.just(1) | JSON,
            "area": NUMBER | JSON,
            "iscrowd": st.sampled_from([0, 1]) | JSON,
            "ignore": st.just(0) | JSON,
            "bbox": st.lists(NUMBER, min_size=4, max_size=4) | JSON,
            "segmentation": st.lists(POLYGON, max_size=2) | RLE | JSON,
        },
    ),
    st.booleans(),
    st.booleans(),
)
def test_fast_finds_what_slow_finds_in_anything(annotation, masks, evaluated):
    images = [{"id": i, "file_name": str(i), "height": 64, "width": 96} for i in (1, 4)]
    categories = [{"id": 1, "name": "class"}]
    content = {"images": images, "annotations": [annotation], "categories": categories}
    fast, slow = (_found(content, x, masks=masks, evaluated=evaluated)[0] for x in (True, False))
    assert fast == slow


def test_only_the_damaged_are_checked_exactly(squares):
    rng = np.random.default_rng(0)
    for index, annotation in enumerate(squares.content["annotations"]):
        if index % 2:
            polygons = [_outline(rng, 64, 96), SQUARE]
            squares.annotation(index, segmentation=polygons, bbox=tight_box(polygons))
        else:
            squares.annotation(index, segmentation=annotation["segmentation"], ignore=0)
    assert _found(squares.content, True) == ([], 0)
    assert _found(squares.content, False) == ([], 8)
    squares.annotation(1, segmentation=[[NAN] * 8])
    squares.annotation(2, segmentation=rle("hello world"))
    squares.annotation(4, bbox=[2.5, 2, 10**400, 24])
    problems, checked = _found(squares.content, True)
    assert problems == _found(squares.content, False)[0]
    assert len(problems) == checked == 3


def _set(kind, index, **changes):
    return lambda s: s.content[kind][index].update(changes)


TYPES = {
    "id is not a whole number or text (1.0)": _set("images", 0, id=1.0),
    "id is not a whole number or text (true)": _set("images", 0, id=True),
    "id is not a whole number or text (null)": _set("annotations", 0, id=None),
    "id is not a whole number or text (nan)": _set("categories", 0, id=NAN),
    "file name is not text (7)": _set("images", 0, file_name=7),
    "has no file name": _set("images", 0, file_name=None),
    "size is not whole numbers (64.0 x 96.0)": _set("images", 0, height=64.0, width=96.0),
    "size is not whole numbers ('64' x '96')": _set("images", 0, height="64", width="96"),
    "has no size (height is null, width 96)": _set("images", 0, height=None),
    "name is not text (1)": _set("categories", 0, name=1),
    "name is not text (true)": _set("categories", 0, name=True),
    "unknown category (category_id is '2', which is text; categories have numbers as ids)": _set(
        "annotations", 0, category_id="2"
    ),
    "unknown category (category_id is 2.0, which is not a whole number or text)": _set(
        "annotations", 0, category_id=2.0
    ),
    "unknown category (category_id is null, which is not a whole number or text)": _set(
        "annotations", 0, category_id=None
    ),
    "unknown category (it has no category_id)": lambda s: s.annotation(0, category_id=None),
    "unknown category (99)": _set("annotations", 0, category_id=99),
    "unknown image (image_id is '1', which is text; images have numbers as ids)": _set(
        "annotations", 0, image_id="1"
    ),
    "unknown image (image_id is true, which is not a whole number or text)": _set(
        "annotations", 0, image_id=True
    ),
    "'iscrowd' is neither 0 nor 1 ('0')": _set("annotations", 0, iscrowd="0"),
    "area is not a number ('576')": _set("annotations", 0, area="576"),
    "box is not four numbers ([2, 2, True, 24])": _set("annotations", 0, bbox=[2, 2, True, 24]),
    "box is not four numbers (null)": _set("annotations", 0, bbox=None),
    "annotation id is 0 (COCO's evaluation takes it for none; number annotations from 1)": _set(
        "annotations", 0, id=0
    ),
}


@pytest.mark.parametrize("message", TYPES)
def test_messages_show_what_is_there(squares, message):
    TYPES[message](squares)
    errors = [p for p in check_annotations(squares.content) if p.severity == "error"]
    assert any(str(p).endswith(f": {message}") for p in errors)
    cfg = squares.config()
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    with pytest.raises(DataError, match=f"{squares.json_file} cannot be used"):
        setup_datasets(cfg)


UNREADABLE_MASKS = {
    "has no mask": (None, [], {}),
    "polygon of fewer than three points": ([[]], [SQUARE[:4]], [SQUARE[:4], SQUARE], [[1, 2]]),
    "polygon with an odd number of coordinates": ([SQUARE[:5]],),
}


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("what", UNREADABLE_MASKS)
def test_masks_that_evaluation_cannot_read(squares, what, crowd):
    """pycocotools tells polygons from boxes by the first, and reads the masks of crowds."""
    for segmentation in UNREADABLE_MASKS[what]:
        changed = squares.content["annotations"][4]
        changed.update(segmentation=segmentation, iscrowd=crowd, bbox=[10, 10, 20, 20])
        errors = [p for p in check_annotations(squares.content) if p.severity == "error"]
        assert what in [p.what for p in errors]
        assert {p.where for p in errors} == {"annotation 5 (image 3)"}
        cfg = squares.config()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], cfg.DATASETS.TRAIN
        with pytest.raises(DataError, match=what):
            setup_datasets(cfg)


def test_training_needs_no_masks_of_crowds(squares):
    squares.annotation(4, segmentation=None, iscrowd=1)
    [warning] = check_annotations(squares.content, evaluated=False)
    assert warning.what == "many are crowds"
    setup_datasets(squares.config())


def test_no_masks_at_all_is_one_error(squares):
    for annotation in squares.content["annotations"]:
        annotation["segmentation"] = []
    assert check_annotations(squares.content) == []
    [error] = check_annotations(squares.content, masks=True)
    assert str(error) == "annotations: have no masks (MODEL.MASK_ON must be False)"
    for split in ("TRAIN", "TEST"):
        cfg = squares.config("DATASETS.TRAIN", [])
        cfg.DATASETS[split] = ["checked_squares"]
        with pytest.raises(DataError, match="instances.json has no masks; MODEL.MASK_ON must be F"):
            setup_datasets(cfg)


def test_category_without_annotations(squares, caplog):
    squares.content["categories"].insert(0, {"id": 0, "name": "cells"})
    problems = check_annotations(squares.content, evaluated=False)
    assert list(map(str, problems)) == ["category 0 (cells): has no annotations"]
    # A small test set may lack some.
    assert check_annotations(squares.content, trained=False) == []
    cfg = squares.config("MODEL.ROI_HEADS.NUM_CLASSES", 0)
    assert "category 0 (cells): has no annotations" in _logged(cfg, caplog)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], cfg.DATASETS.TRAIN
    assert _logged(cfg, caplog) == ""


def test_category_of_crowds(squares):
    for annotation in squares.content["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 1)
    many, none = check_annotations(squares.content)
    number = sum(a["iscrowd"] for a in squares.content["annotations"])
    assert str(many).startswith(f"annotations: many are crowds ({number} of 8 have iscrowd 1")
    assert str(none) == "category 1 (class0): has no annotations (all have iscrowd 1)"


OTHERS = {  # not holes, but parts and a part that overlaps
    "beside": [40, 10, 45, 10, 45, 20],
    "overlapping": [15, 15, 25, 15, 25, 40, 15, 40],
    "in a corner outside": [11, 27, 11, 29, 13, 29],
}


@pytest.mark.parametrize("other", OTHERS)
def test_parts_are_not_holes(squares, other):
    outer = [10, 10, 30, 10, 30, 30] if other == "in a corner outside" else SQUARE
    box = [10, 10, 35, 30]
    squares.annotation(0, bbox=box, segmentation=[outer, OTHERS[other]])
    assert not [p for p in check_annotations(squares.content) if "polygon" in p.what]


def test_a_part_that_the_area_counts_is_no_hole(squares):
    """As an annotator's second outline in a few objects of COCO."""
    squares.annotation(0, bbox=[10, 10, 20, 20], segmentation=[SQUARE, INNER])
    for area in (300, 400, None, 500):
        squares.annotation(0, area=area)
        found = [p.what for p in check_annotations(squares.content, evaluated=False)]
        assert found == ["polygon inside another of its mask"] * (area != 500)


def test_a_hole_among_many_parts(squares):
    parts = [[x, 40, x + 1, 40, x + 1, 41] for x in range(10, 90, 2)]
    squares.annotation(0, bbox=[10, 10, 80, 31], segmentation=[*parts, INNER, SQUARE])
    [warning] = check_annotations(squares.content)
    assert warning.what == "polygon inside another of its mask"


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox", "segmentation", "iscrowd"])
def test_almost_the_same_object(squares, key):
    _polygons(squares)
    first = squares.content["annotations"][0]
    other = {
        "image_id": 2,
        "category_id": first["category_id"] % 3 + 1,
        "bbox": [first["bbox"][0] + 0.5, *first["bbox"][1:]],
        "segmentation": [[v + 0.5 for v in first["segmentation"][0]]],
        "iscrowd": 1,
    }
    again = {**first, "id": 99, key: other[key]}
    squares.content["annotations"].append(again)
    found = [p.what for p in check_annotations(squares.content)]
    assert found == ["many are crowds"] * (key == "iscrowd")


def test_categories_of_one_name(squares, caplog):
    squares.content["categories"][2]["name"] = "class0"
    [warning] = check_annotations(squares.content)
    assert warning.where == "category 3 (class0)" and warning.severity == "warning"
    assert "another category has the same name" in _logged(squares.config(), caplog)


@pytest.mark.parametrize("crowds", [False, True])
def test_nothing_to_evaluate_on(squares, caplog, crowds):
    for annotation in squares.content["annotations"]:
        annotation["iscrowd"] = 1
    if not crowds:
        squares.content["annotations"].clear()
    [warning] = check_annotations(squares.content)
    assert warning.what == "there are none to evaluate on" and warning.severity == "warning"
    error = check_annotations(squares.content, evaluated=False, trained=True)[0]
    assert error.severity == "error"
    assert all(("all have iscrowd 1" in p.detail) == crowds for p in (warning, error))
    cfg = squares.config("MODEL.ROI_HEADS.NUM_CLASSES", 0)
    reason = "; all have iscrowd 1" if crowds else ""
    with pytest.raises(DataError, match=f"instances.json has no annotations to train on{reason}."):
        setup_datasets(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], cfg.DATASETS.TRAIN
    assert "instances.json: annotations: there are none to evaluate on" in _logged(cfg, caplog)


def _logged(cfg, caplog):
    caplog.clear()
    logging.getLogger("panet_d2").propagate = True
    with caplog.at_level(logging.WARNING, "panet_d2"):
        setup_datasets(cfg)
    return "\n".join(r.getMessage() for r in caplog.records)
