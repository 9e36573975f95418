"""Boxes in another convention than COCO's, found by their masks or by their images."""

import copy

import numpy as np
import pytest
from pycocotools import mask as mask_util

from panet_d2.data import check_annotations, setup_datasets
from panet_d2.errors import DataError

from .test_check_annotations import squares  # noqa: F401 (a fixture)

HEIGHT, WIDTH = 120, 160


def _mask(box, kind):
    x, y, w, h = box
    if kind == "polygons":  # an object that another one covers in the middle
        return [
            [x, y, x + w / 3, y, x + w / 3, y + h, x, y + h],
            [x + w / 2, y, x + w, y, x + w, y + h, x + w / 2, y + h],
        ]
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + h, x : x + w] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def dataset(kind, count=40):
    """Objects anywhere in the images, with boxes in COCO's convention."""
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(1, count + 1):
        w, h = rng.integers(8, 50, 2).tolist()
        box = [int(rng.integers(WIDTH - w)), int(rng.integers(HEIGHT - h)), w, h]
        annotations.append(
            {
                **{"id": number, "image_id": 1 + number % 4, "category_id": 1},
                **{"bbox": box, "area": w * h, "iscrowd": 0},
                **({"segmentation": _mask(box, kind)} if kind != "none" else {}),
            }
        )
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(1, 5)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }


def with_boxes(content, convention, every=1):
    content = copy.deepcopy(content)
    for annotation in content["annotations"][::every]:
        annotation["bbox"] = [float(v) for v in convention(*annotation["bbox"])]
    return content


CONVENTIONS = {
    "corners (x0, y0, x1, y1)": lambda x, y, w, h: (x, y, x + w, y + h),
    "corners (y0, x0, y1, x1)": lambda x, y, w, h: (y, x, y + h, x + w),
    "y, x, height, width": lambda x, y, w, h: (y, x, h, w),
    "x, y, height, width": lambda x, y, w, h: (x, y, h, w),
    "center x, center y, width, height": lambda x, y, w, h: (x + w / 2, y + h / 2, w, h),
    "x, y, width, height, in fractions": lambda x, y, w, h: (
        *(x / WIDTH, y / HEIGHT),
        *(w / WIDTH, h / HEIGHT),
    ),
    "center x, center y, width, height, in fractions": lambda x, y, w, h: (
        *((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT),
        *(w / WIDTH, h / HEIGHT),
    ),
}


@pytest.mark.parametrize("kind", ["polygons", "rle"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_masks_show_the_convention(name, kind):
    content = with_boxes(dataset(kind), CONVENTIONS[name])
    [error] = [p for p in check_annotations(content) if p.severity == "error"]
    assert error.what.startswith(f"boxes look like {name}")
    assert error.what.endswith("COCO's are x, y, width, height, in pixels")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("corners (x0, y0, x1, y1)", "corners (x0, y0, x1, y1)"),
        ("corners (y0, x0, y1, x1)", "corners"),
        ("center x, center y, width, height, in fractions", "fractions of the image's size"),
    ],
)
def test_images_show_the_convention_of_boxes_without_masks(name, shown):
    content = with_boxes(dataset("none"), CONVENTIONS[name])
    [error] = [p for p in check_annotations(content) if p.severity == "error"]
    assert error.what.startswith(f"boxes look like {shown}")


def test_training_is_refused(squares):  # noqa: F811
    for annotation in squares.content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    message = "instances.json cannot be used: annotations: boxes look like corners"
    with pytest.raises(DataError, match=message):
        setup_datasets(squares.config())


def test_boxes_elsewhere():
    content = with_boxes(dataset("rle"), lambda *box: [v / 3 for v in box])
    [error] = [p for p in check_annotations(content) if p.severity == "error"]
    assert error.what.startswith("boxes lie beside their masks")


@pytest.mark.parametrize("kind", ["polygons", "rle", "none"])
@pytest.mark.parametrize(
    "change",
    [
        np.rint,
        np.floor,
        np.ceil,
        lambda box: box + [-2, -2, 4, 4],
        lambda box: box - [0, 0, 1, 1],  # the last pixel instead of the end
        lambda box: box * 0.999,
    ],
)
def test_rounded_boxes_are_right(kind, change):
    """Also where the objects are small and do not begin at whole pixels."""
    content = dataset(kind)
    for annotation in content["annotations"]:
        box = np.array(annotation["bbox"]) + [0.6, 0.6, -1.2, -1.2]
        annotation["bbox"] = change(box).tolist()
    problems = check_annotations(content)
    assert all("outside" in p.what for p in problems)


@pytest.mark.parametrize("kind", ["polygons", "rle", "none"])
def test_boxes_of_whole_objects_are_no_error(kind):
    """Masks of the visible part, boxes of all, some beyond the image."""
    content = with_boxes(dataset(kind), lambda x, y, w, h: (x - w / 2, y, 2 * w, 2 * h))
    problems = check_annotations(content)
    assert {p.severity for p in problems} == {"warning"}
    differs = [p for p in problems if p.what == "box differs from its mask"]
    assert bool(differs) == (kind != "none") and all(p.detail.startswith("IoU 0.") for p in differs)


def test_some_boxes_in_another_convention_are_named():
    content = with_boxes(dataset("rle"), CONVENTIONS["corners (x0, y0, x1, y1)"], every=20)
    problems = [p for p in check_annotations(content) if "outside" not in p.what]
    assert [p.where for p in problems] == ["annotation 1 (image 2)", "annotation 21 (image 2)"]
    assert all(p.severity == "warning" and "it looks like corners" in p.detail for p in problems)


def test_tiny_images_and_objects():
    content = dataset("none", count=4)
    for image, annotation in zip(content["images"], content["annotations"]):
        image.update(height=1, width=1)
        annotation.update(image_id=image["id"], bbox=[0, 0, 1, 1], area=1)
    assert check_annotations(content) == []


@pytest.mark.parametrize("kind", ["polygons", "none"])
@pytest.mark.parametrize("box", [[0, 0, 0, 0], [WIDTH + 5, 0, 9, 9]])
def test_boxes_that_are_all_lost(kind, box):
    """Training would leave out each object, without an error."""
    content = with_boxes(dataset(kind), lambda *_: box)
    problems = check_annotations(content)
    assert [p.what for p in problems if p.severity == "error"] == [
        "most boxes have no area or are outside their image; compute boxes from the masks"
    ]
    content = with_boxes(dataset(kind), lambda *_: box, every=3)
    assert {p.severity for p in check_annotations(content)} == {"warning"}


def test_boxes_and_masks_in_fractions():
    content = with_boxes(dataset("polygons"), lambda x, y, w, h: (0.2, 0.2, 0.1, 0.3))
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[0.2, 0.2, 0.3, 0.2, 0.3, 0.5, 0.2, 0.5]]
    assert any("look like fractions" in p.what for p in check_annotations(content))


def _c_order(mask):
    return mask.reshape(WIDTH, HEIGHT).T


@pytest.mark.parametrize("change", [_c_order, lambda mask: 1 - mask, np.ones_like])
def test_masks_of_other_pixels(change):
    """Runs along the rows; the background; all of the image."""
    content = dataset("rle")
    for annotation in content["annotations"]:
        mask = np.asfortranarray(change(mask_util.decode(annotation["segmentation"])))
        counts = mask_util.encode(mask)["counts"].decode()
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    errors = [p.what for p in check_annotations(content) if p.severity == "error"]
    assert len(errors) == 1 and "their masks" in errors[0], errors


@pytest.mark.parametrize(
    "area, severity, what",
    [
        (-576, "error", "area is not that of an object"),
        (1e11, "error", "area is not that of an object"),
        (0, "warning", "area is 0"),
        (HEIGHT * WIDTH + 1, "warning", "area is larger than the image"),
    ],
)
def test_areas_that_the_evaluation_takes_for_others(area, severity, what):
    content = dataset("rle")
    content["annotations"][3]["area"] = area
    found = check_annotations(content)
    assert [(p.severity, p.what) for p in found] == [(severity, what)]
    assert "annotation 4" in found[0].where
    assert check_annotations(content, evaluated=False) == []


CUTS = [
    lambda x, y, w, h: (x + 0.6 * w, y, 0.4 * w, h),
    lambda x, y, w, h: (x, y + 0.6 * h, w, 0.4 * h),
    lambda x, y, w, h: (x, y, 0.4 * w, h),
    lambda x, y, w, h: (x, y, w, 0.4 * h),
]


@pytest.mark.parametrize("cut", CUTS, ids=["left", "top", "right", "bottom"])
def test_each_edge_is_compared(cut):
    """A box of two fifths of its object, whose other three edges are right."""

    content = with_boxes(dataset("rle"), cut, every=20)
    assert [p.what for p in check_annotations(content)] == ["box differs from its mask"] * 2
