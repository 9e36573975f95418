import json
import os

import numpy as np
import pytest
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from pycocotools import mask as mask_util

from panet_d2.data import NamedImageMapper, check_annotations, setup_datasets
from panet_d2.errors import DataError

from ..common import tiny_cfg, write_coco

NAN = float("nan")
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


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
        """Change an annotation; what is None is removed."""
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
    assert {p.severity for p in check_annotations(squares.content)} == {"warning"}


def test_an_outline_may_cross_itself(squares):
    squares.annotation(4, segmentation=[[10, 10, 30, 30, 30, 10, 10, 30]])
    assert check_annotations(squares.content) == []


@pytest.mark.parametrize("seed", range(5))
def test_whole_rle_is_none(squares, seed):
    """Also with one pixel, runs of any length, and the object at either end."""
    rng = np.random.default_rng(seed)
    for probability in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = (rng.random((64, 96)) < probability).astype(np.uint8)
        mask[rng.integers(64), rng.integers(96)] = 1
        encoded = mask_util.encode(np.asfortranarray(mask))
        squares.annotation(4, segmentation=rle(encoded["counts"].decode()))
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
    with pytest.raises(DataError, match=f"{squares.json_file}: each of its categories.*name"):
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
    many = [{**first, "id": 100 + i, "image_id": 4} for i in range(1200)]
    squares.content["annotations"] += many


# What training copes with, the warning for it, and the objects that are left in each image.
PARTLY_WRONG = {
    "box of no area": (lambda s: s.annotation(6, bbox=[9, 9, 0, 9]), [2, 2, 2, 1]),
    "box is outside the image": (lambda s: s.annotation(6, bbox=[96, 9, 9, 9]), [2, 2, 2, 1]),
    "box is partly outside the image": (
        lambda s: s.annotation(6, bbox=[-9, 9, 40, 99]),
        [2, 2, 2, 2],
    ),
    "box is partly outside the image below": (
        lambda s: s.annotation(6, bbox=[9, 40, 24, 26]),
        [2, 2, 2, 2],
    ),
    "mask is partly outside the image": (
        lambda s: s.annotation(6, segmentation=[[-9, 9, 30, 9, 30, 30]]),
        [2, 2, 2, 2],
    ),
    "polygon of fewer than three points": (
        lambda s: s.annotation(6, segmentation=[SQUARE, SQUARE[:4]]),
        [2, 2, 2, 2],
    ),
    "has no annotations": (lambda s: s.content["annotations"].__delitem__(slice(6, 8)), [2, 2, 2]),
    "annotation id is 0": (lambda s: s.annotation(6, id=0), [2, 2, 2, 2]),
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
