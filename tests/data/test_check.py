import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from panet_d2.data import (
    check_annotations,
    check_coco,
    check_images,
    check_training_images,
    setup_datasets,
)
from panet_d2.errors import DataError

from ..test_real_data import DATASETS, needs
from .test_check_annotations import NAN, brief, rle, squares  # noqa: F401 (a fixture)


def test_nothing_is_wrong(squares):  # noqa: F811
    assert check_coco(squares.json_file, squares.root) == []
    del squares.content["annotations"]  # a test set without its truth
    assert check_annotations(squares.content) == []


def test_an_annotation_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: "):
        check_coco(str(tmp_path), str(tmp_path))  # a folder: root may read every file


def test_all_are_found_at_once(squares):  # noqa: F811
    squares.annotation(0, bbox=[NAN] * 4, segmentation=rle("hello world"), category_id=7)
    squares.annotation(2, image_id=99)
    squares.annotation(5, bbox=[5, 5, 0, 7])
    squares.image(1, file_name="lost.png")
    with open(squares.image(2), "wb"):
        pass
    squares.config()
    assert brief(check_coco(squares.json_file, squares.root)) == [
        ("error", "annotation 1 (image 1)", "unknown category"),
        ("error", "annotation 1 (image 1)", "box is not four numbers"),
        ("error", "annotation 1 (image 1)", "malformed RLE"),
        ("error", "annotation 3 (image 99)", "unknown image"),
        ("warning", "annotation 6 (image 3)", "box of no area"),
        ("error", f"{squares.root}/lost.png", "there is no such image"),
        ("error", f"{squares.root}/003.png", "image cannot be read"),
    ]


# Image 1 of the data set in a form that training does not take, and what is wrong then.
def _bytes(change):
    def spoil(path):
        with open(path, "rb") as f:
            content = bytearray(f.read())
        with open(path, "wb") as f:
            f.write(change(content))

    return spoil


def _flip_a_bit(content):
    content[len(content) // 2] ^= 1
    return content


def _saved(format, convert=lambda image: image, cut=None, **options):
    def spoil(path):
        convert(Image.open(path)).save(path, format, **options)
        if cut:
            _bytes(lambda content: content[: int(len(content) * cut)])(path)

    return spoil


def _deep(dtype):
    return lambda image: Image.fromarray(np.array(image)[..., 0].astype(dtype) * 200)


def _turned(path):
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, "PNG", exif=exif)


BROKEN_IMAGES = {
    "image cannot be read": _bytes(lambda content: b""),
    "image cannot be read, no image": _bytes(lambda content: b"no image"),
    "image cannot be read, header only": _bytes(lambda content: content[:33]),
    "image cannot be read, half a PNG": _bytes(lambda content: content[: len(content) // 2]),
    "image cannot be read, one bit": _bytes(_flip_a_bit),
    "image cannot be read, half a JPEG": _saved("JPEG", cut=0.5),
    "image cannot be read, most of a JPEG": _saved("JPEG", cut=0.95),
    "image cannot be read, half a TIFF": _saved("TIFF", cut=0.5),
    "there is no such image": os.remove,
    "image has more than 8 bits per channel": _saved("PNG", _deep(np.uint16)),
    "image has more than 8 bits per channel, TIFF": _saved("TIFF", _deep(np.uint16)),
    "image has more than 8 bits per channel, int": _saved("TIFF", _deep(np.int32)),
    "image has more than 8 bits per channel, float": _saved("TIFF", _deep(np.float32)),
    "image has another size than annotated": _saved("PNG", lambda image: image.resize((95, 64))),
    "image has another size than annotated, turned": _turned,
}


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("what", BROKEN_IMAGES)
def test_broken_images_are_refused(squares, what, tolerant, monkeypatch):  # noqa: F811
    """Also where the program has told Pillow to fill in what truncated images lack."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    path = squares.image(1)
    BROKEN_IMAGES[what](path)
    [problem] = check_images(squares.content["images"], squares.root)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant
    assert (problem.severity, problem.where) == ("error", path)
    assert what.startswith(problem.what)
    assert ("EXIF" in problem.detail) == ("turned" in what)
    if what == "there is no such image":
        return  # setup_datasets says so already
    cfg = squares.config()
    setup_datasets(cfg)
    with pytest.raises(DataError, match=f"{squares.json_file} cannot be used: {path}: .*check_dat"):
        check_training_images(cfg)
    cfg.DATASETS.CHECK_IMAGES = False
    check_training_images(cfg)


def test_images_of_evaluations_are_read_too(squares):  # noqa: F811
    cfg = squares.config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], cfg.DATASETS.TRAIN
    setup_datasets(cfg)
    check_training_images(cfg)
    BROKEN_IMAGES["image cannot be read"](squares.image(1))
    with pytest.raises(DataError, match="002.png"):
        check_training_images(cfg)


def test_images_come_in_order(squares):  # noqa: F811
    for index in (3, 0, 2):
        os.remove(squares.image(index))
    problems = check_images(squares.content["images"], squares.root, workers=3)
    names = [os.path.basename(p.where) for p in problems]
    assert names == ["001.png", "003.png", "004.png"]


def test_no_image_folder(squares):  # noqa: F811
    with pytest.raises(DataError, match="no image folder .*nowhere"):
        check_coco(squares.json_file, squares.root + "/nowhere")


@pytest.mark.parametrize(
    "files",
    [
        pytest.param("coco/annotations/instances_val2017.json coco/val2017", marks=needs("coco")),
        pytest.param("dsb2018/annotations/instances_val.json dsb2018/val", marks=needs("dsb2018")),
    ],
)
def test_published_data_is_right(files):
    assert check_coco(*(str(DATASETS / name) for name in files.split())) == []
