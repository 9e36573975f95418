import copy
import sys
import traceback

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.common import MapDataset
from detectron2.data.transforms import Augmentation, AugmentationList, RandomCrop, RandomRotation
from fvcore.transforms.transform import NoOpTransform
from PIL import Image
from torch.utils.data import DataLoader

from panet_d2.data import NamedImageMapper, check_images, register_coco_file
from panet_d2.errors import ConfigError, DataError

from ..common import tiny_cfg, write_coco


@pytest.fixture
def record(tmp_path):
    register_coco_file("mapper_squares", *write_coco(tmp_path))
    return DatasetCatalog.get("mapper_squares")[0]


def test_maps_as_the_stock_one(record):
    mapped = NamedImageMapper(tiny_cfg(), True)(record)
    assert mapped["image"].shape == (3, 64, 96)
    assert len(mapped["instances"].gt_masks) == 2


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "YUV-BT.601", "HSV", "LAB", "YCbCr"])
def test_every_format_has_a_type_that_models_take(record, image_format):
    cfg = tiny_cfg("INPUT.FORMAT", image_format)
    assert NamedImageMapper(cfg, True)(record)["image"].dtype in (torch.uint8, torch.float32)


def spoil(file_name, content):
    with open(file_name, "wb") as f:
        f.write(content)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_unreadable_image_is_named(record, content):
    spoil(record["file_name"], content)
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg(), True)(record)


def test_workers_say_no_more_than_the_mapper(record):
    """torch puts the traceback of the process into the text of the error."""
    spoil(record["file_name"], b"")
    mapped = MapDataset([record], NamedImageMapper(tiny_cfg(), True))
    with pytest.raises(DataError) as alone:
        next(iter(DataLoader(mapped)))
    with pytest.raises(DataError) as of_worker:
        next(iter(DataLoader(mapped, num_workers=1)))
    assert str(of_worker.value) == str(alone.value)
    assert str(alone.value).startswith(f"cannot use image {record['file_name']}: ")


class Broken(Augmentation):
    """A user's augmentation, with a bug in itself or in its transform."""

    def __init__(self, transform=None):
        self.transform = transform

    def get_transform(self, image):
        if self.transform is None:
            raise KeyError("a bug of mine")
        return self.transform


class BrokenForBoxes(NoOpTransform):
    def apply_coords(self, coords):
        return {}["a bug of mine"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augmentation", [Broken(), Broken(BrokenForBoxes()), BrokenForBoxes()])
def test_a_bug_in_an_augmentation_is_not_the_images(record, augmentation, workers):
    """It keeps its type and its traceback, from a worker too."""
    mapper = NamedImageMapper(tiny_cfg(), True)
    mapper.augmentations = AugmentationList([augmentation])
    with pytest.raises(KeyError) as e:
        next(iter(DataLoader(MapDataset([record], mapper), num_workers=workers)))
    report = str(e.value) if workers else "".join(traceback.format_tb(e.value.__traceback__))
    assert "test_dataset_mapper.py" in report and "cannot use image" not in str(e.value)


def test_a_config_error_is_not_the_images(record):
    mapper = NamedImageMapper(tiny_cfg("INPUT.SAME_SIZE_PER_BATCH", True), True)
    with pytest.raises(ConfigError, match="INPUT.SAME_SIZE_PER_BATCH") as e:
        mapper(record)
    assert "001.png" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_argument_of_an_augmentation_is_not_the_images(record, workers):
    """An augmentation of Detectron2 in a user's own list."""
    mapper = NamedImageMapper(tiny_cfg(), True)
    mapper.augmentations = AugmentationList([RandomRotation(["90"], sample_style="choice")])
    with pytest.raises(TypeError) as e:
        next(iter(DataLoader(MapDataset([record], mapper), num_workers=workers)))
    assert "cannot use image" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shapely_is_not_the_images(record, monkeypatch, workers):
    for name in ("shapely", "shapely.geometry"):
        monkeypatch.setitem(sys.modules, name, None)
    record["annotations"][0].update(segmentation=[[1, 1, 50, 1, 50, 50]])
    mapper = NamedImageMapper(tiny_cfg("INPUT.CROP.ENABLED", True), True)
    mapper.augmentations = AugmentationList([RandomCrop("absolute", (32, 32))])
    with pytest.raises(ConfigError, match="pip install shapely"):
        next(iter(DataLoader(MapDataset([record], mapper), num_workers=workers)))


def test_what_stock_augmentations_cannot_use_is_named(record):
    """A polygon of two points, in Detectron2's own step from polygons to masks."""
    record["annotations"][0]["segmentation"] = [[1, 1, 5]]
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg("INPUT.MASK_FORMAT", "polygon"), True)(record)


def test_missing_image_is_named(record):
    record["file_name"] += ".lost"
    with pytest.raises(DataError, match="001.png.lost"):
        NamedImageMapper(tiny_cfg(), False)(record)


def test_other_size_is_named(record):
    record["width"] = 97
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg(), True)(record)


@pytest.mark.parametrize("size", [[64, 95], [128, 96]])
def test_mask_of_another_size_is_named(record, size):
    counts = record["annotations"][0]["segmentation"]["counts"]
    record["annotations"][0]["segmentation"] = {"size": size, "counts": counts}
    with pytest.raises(DataError, match="001.png"):
        NamedImageMapper(tiny_cfg(), True)(record)


@pytest.fixture
def mapped(record):
    """What training gets of the image, without random augmentation."""
    mapper = NamedImageMapper(tiny_cfg("INPUT.RANDOM_FLIP", "none"), True)
    return lambda: mapper(record)


def pixels(mapped):
    """As (height, width, RGB)."""
    return mapped["image"].flip(0).permute(1, 2, 0).numpy()


def coloured(record):
    """Another picture in place of the grey one, bright where the objects are."""
    picture = np.array(Image.open(record["file_name"]))
    slope = np.linspace(0, 55, 96).astype(np.uint8)
    picture[..., 0] += slope
    picture[..., 2] += slope[::-1]
    return Image.fromarray(picture)


def is_readable(record):
    """By what is checked before training."""
    return check_images([record], "") == []


LOSSLESS = {
    "grey": ("PNG", lambda x: x.convert("L")),
    "grey with alpha": ("PNG", lambda x: x.convert("LA")),
    "black and white": ("PNG", lambda x: x.convert("1")),
    "palette": ("PNG", lambda x: x.quantize(16)),
    "palette in GIF": ("GIF", lambda x: x.quantize(16)),
    "alpha": ("PNG", lambda x: x.convert("RGBA")),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_other_kinds_of_images_train_as_rgb(record, mapped, kind):
    format, convert = LOSSLESS[kind]
    image = convert(coloured(record))
    image.save(record["file_name"], format)
    assert is_readable(record)
    assert np.array_equal(pixels(mapped()), np.array(image.convert("RGB")))


def test_alpha_is_left_out(record, mapped):
    """Also where it is transparent: the colours are those of the file."""
    image = coloured(record)
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    transparent.save(record["file_name"])
    assert is_readable(record)
    assert np.array_equal(pixels(mapped()), np.array(image))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_is_close_to_rgb(record, mapped, format):
    image = coloured(record)
    image.convert("CMYK").save(record["file_name"], format, quality=95)
    assert Image.open(record["file_name"]).mode == "CMYK"
    assert is_readable(record)
    error = np.abs(pixels(mapped()).astype(int) - np.array(image))
    assert error.mean() < (1 if format == "TIFF" else 8)  # the picture is mostly noise


def test_colours_of_16_bits_train_as_8(record, mapped):
    """Unlike grey ones of 16 bits, which are refused: Pillow takes the upper half of these."""
    image = np.array(coloured(record))
    cv2.imwrite(record["file_name"], image[..., ::-1].astype(np.uint16) * 257)
    assert is_readable(record)
    assert np.array_equal(pixels(mapped()), image)


UNDO_EXIF = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", UNDO_EXIF)
def test_exif_turns_images_to_where_the_boxes_are(record, mapped, orientation):
    """The annotations are those of the picture as it is seen."""
    seen = np.array(coloured(record))
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(UNDO_EXIF[orientation](seen)))
    stored.save(record["file_name"], exif=exif)
    assert is_readable(record)
    x = mapped()
    assert np.array_equal(pixels(x), seen)
    for (x0, y0, x1, y1), mask in zip(
        x["instances"].gt_boxes.tensor.int().tolist(), x["instances"].gt_masks
    ):
        assert (pixels(x)[y0:y1, x0:x1, 1] == 200).all() and (pixels(x)[mask][:, 1] == 200).all()


def add(record, **changes):
    """An annotation more, which is a copy of the first with changes."""
    record["annotations"].append({**copy.deepcopy(record["annotations"][0]), **changes})


@pytest.mark.parametrize("bbox", [[9, 9, 0, 9], [9, 9, 9, 0], [96, 0, 9, 9], [-9, 9, 9, 9]])
def test_objects_without_a_visible_box_are_left_out(record, mapped, bbox):
    expected = mapped()["instances"]
    add(record, bbox=bbox)
    found = mapped()["instances"]
    assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert torch.equal(found.gt_masks.tensor, expected.gt_masks.tensor)


def test_what_is_outside_the_image_is_cut(record, mapped):
    add(record, bbox=[80, -10, 30, 30], segmentation=[[80, -10, 110, -10, 110, 20, 80, 20]])
    found = mapped()["instances"]
    assert found.gt_boxes.tensor[2].tolist() == [80, 0, 96, 20]
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[:20, 80:] = True
    assert torch.equal(found.gt_masks.tensor[2], expected)


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("crop", [False, True])
def test_image_without_objects(record, crop, crowd):
    """After a crop the boxes are those of the masks, and here there are none."""
    record["annotations"] = [{**a, "iscrowd": 1} for a in record["annotations"]] if crowd else []
    cfg = tiny_cfg("INPUT.CROP.ENABLED", crop)
    instances = NamedImageMapper(cfg, True)(record)["instances"]
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64


def test_boxes_of_crops_are_those_of_the_masks(record):
    torch.manual_seed(0)
    x = NamedImageMapper(tiny_cfg("INPUT.CROP.ENABLED", True), True)(record)
    boxes = x["instances"].gt_masks.get_bounding_boxes().tensor
    assert len(boxes) and torch.equal(x["instances"].gt_boxes.tensor, boxes)
