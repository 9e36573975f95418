import pytest
from detectron2.data import DatasetCatalog

from panet_d2.data import DataError, NamedImageMapper, register_coco_file

from ..common import tiny_cfg, write_coco


@pytest.fixture
def record(tmp_path):
    register_coco_file("mapper_squares", *write_coco(tmp_path))
    return DatasetCatalog.get("mapper_squares")[0]


def test_maps_as_the_stock_one(record):
    mapped = NamedImageMapper(tiny_cfg(), True)(record)
    assert mapped["image"].shape == (3, 64, 96)
    assert len(mapped["instances"].gt_masks) == 2


def spoil(file_name, content):
    with open(file_name, "wb") as f:
        f.write(content)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_unreadable_image_is_named(record, content):
    spoil(record["file_name"], content)
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg(), True)(record)


def test_missing_image_is_named(record):
    record["file_name"] += ".lost"
    with pytest.raises(DataError, match="001.png.lost"):
        NamedImageMapper(tiny_cfg(), False)(record)


def test_other_size_is_named(record):
    record["width"] = 97
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg(), True)(record)
