import json

import cv2
import numpy as np
import pytest

from panet_d2.errors import DataError
from panet_d2.planning import fingerprint_table, measure, read_fingerprint, similar_files

from ..common import write_coco
from .common import content


def test_boxes():
    data = measure(
        content([(100, 200, [(0, 0, 10, 40), (50, 50, 20, 20)]), (80, 60, []), (80, 60, [])])
    )
    assert data.sizes.tolist() == [[100, 200], [80, 60], [80, 60]]
    assert data.short_edges.tolist() == [100, 60, 60]
    assert data.elongations.tolist() == [2, 80 / 60, 80 / 60]
    assert data.sides.tolist() == [20, 20]
    assert data.relative_sides.tolist() == [0.2, 0.2]
    assert data.aspect_ratios.tolist() == [4, 1]  # height by width
    assert data.objects_per_image.tolist() == [2, 0, 0]
    assert data.empty_share == pytest.approx(2 / 3)


def test_what_does_not_count():
    """Crowds and boxes without area, as in training; boxes end at the border of the image."""
    annotations = content([(100, 100, [(0, 0, 10, 10), (90, 90, 20, 20), (5, 5, 0, 5)])])
    annotations["annotations"][0]["iscrowd"] = 1
    data = measure(annotations)
    assert data.crowds == 1
    assert data.boxes.tolist() == [[90, 90, 100, 100]]


def test_overlaps():
    """IoU of 10 x 10 boxes that share half of each: 50 of 150 pixels. A pair counts once."""
    images = [
        (100, 100, [(0, 0, 10, 10, 0), (5, 0, 10, 10, 1), (60, 60, 10, 10, 0)]),
        (100, 100, [(0, 0, 10, 10, 0), (0, 0, 10, 10, 0)]),
    ]
    data = measure(content(images, classes=2))
    assert data.overlaps == pytest.approx([0, 1 / 3, 0, 0, 1])
    assert data.class_overlaps == pytest.approx([0, 0, 0, 0, 1])
    assert data.images_per_class.tolist() == [2, 1]


def test_categories_by_id():
    annotations = content([(100, 100, [(0, 0, 10, 10, 0), (0, 0, 10, 10, 1)])], classes=2)
    annotations["categories"].reverse()
    data = measure(annotations)
    assert data.categories == ("class0", "class1") and data.classes.tolist() == [0, 1]


@pytest.mark.parametrize("masks", ["polygon", "rle", "none"])
def test_masks(masks):
    data = measure(content([(40, 40, [(0, 0, 10, 10)] * 3)], masks=masks))
    assert data.masks == {masks: 3}
    assert data.corners == 4 if masks == "polygon" else np.isnan(data.corners)


def test_similar_files():
    train = ["a/Cell_01.PNG", "photo.rf.0a1b.jpg", "field (2).jpg", "leaf_flip.png", "0001.png"]
    val = ["b/cell_01.jpg", "photo.rf.ffff.jpg", "field.jpg", "leaf-copy2.png", "0001.png", "x.png"]
    assert similar_files(train, val) == list(zip(train, val))[:4]  # 0001 is a number, not a name


@pytest.mark.parametrize(
    "images", [[(50, 50, [])], [(50, 50, [(1, 1, 4, 4)])], [(50, 50, [(1, 1, 4, 4)]), (9, 9, [])]]
)
def test_report_of_little_data(images):
    data = measure(content(images))
    json.dumps(data.summary(), allow_nan=False)
    assert "objects per image" in fingerprint_table(data)
    assert data.doubt()


def test_files_that_cannot_be_used(tmp_path):
    json_file, root = write_coco(tmp_path)
    assert len(read_fingerprint(json_file, root).boxes) == 8
    with pytest.raises(DataError, match="no image folder"):
        read_fingerprint(json_file, root + "x")
    cv2.imwrite(f"{root}/001.png", np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(DataError, match="001.png: image has another size than annotated .20x10"):
        read_fingerprint(json_file, root)
    (tmp_path / "images/001.png").write_text("none")
    with pytest.raises(DataError, match="001.png: image cannot be read"):
        read_fingerprint(json_file, root)
    (tmp_path / "images/001.png").unlink()
    with pytest.raises(DataError, match="001.png: there is no such image"):
        read_fingerprint(json_file, root)
    (tmp_path / "images/001.png").write_text("none")
    annotations = json.loads((tmp_path / "instances.json").read_text())
    annotations["annotations"][0]["category_id"] = 9
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    with pytest.raises(DataError, match="unknown category"):
        read_fingerprint(json_file, root)


def test_areas_are_those_of_the_masks():
    annotations = content([(100, 100, [(0, 0, 10, 10)])])
    annotations["annotations"][0]["area"] = 30  # the mask fills a part of its box
    assert measure(annotations).areas.tolist() == [30]
