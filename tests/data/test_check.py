import json
import logging
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageFile
from pycocotools.coco import COCO

from panet_d2.data import (
    check_annotations,
    check_coco,
    check_images,
    check_training_images,
    setup_datasets,
)
from panet_d2.data.check import check_sizes
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


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages(squares, format, caplog):  # noqa: F811
    path = squares.image(1)
    image = Image.open(path).convert("RGB")
    image.save(path, format, save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    [warning] = check_images(squares.content["images"], squares.root)
    assert (warning.severity, warning.where) == ("warning", path)
    assert str(warning).endswith("image has several pages (3 pages; only the first is read)")
    cfg = squares.config()
    setup_datasets(cfg)
    logging.getLogger("panet_d2").propagate = True
    with caplog.at_level(logging.WARNING, "panet_d2"):
        check_training_images(cfg)
    assert "002.png: image has several pages" in caplog.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_images_of_all_kinds_become_colors(squares, mode):  # noqa: F811
    path = squares.image(1)
    before = read_image(path, "RGB").astype(int)
    image = Image.open(path).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    image.save(path, "PNG" if mode in ("1", "L", "LA", "P", "RGBA") else "TIFF")
    assert check_images(squares.content["images"], squares.root) == []
    after = read_image(path, "RGB").astype(int)
    assert after.shape == before.shape
    if mode != "1":
        assert abs(after - before).mean() < 25


def test_images_of_several_pages_in_a_photo(squares):  # noqa: F811
    """The other pictures of an MPO are the camera's previews."""
    path = squares.image(1)
    image = Image.open(path).convert("RGB")
    image.save(path, "MPO", save_all=True, append_images=[image.resize((16, 16))])
    assert check_images(squares.content["images"], squares.root) == []


STRIP = dict(height=4, width=4000)


@pytest.mark.parametrize(
    "opts, used, becomes",
    [
        (
            ("INPUT.MAX_SIZE_TRAIN", 400),
            "trained",
            "4000x4 pixels become 400x0 by INPUT.MIN_SIZE_T",
        ),
        (("INPUT.MAX_SIZE_TRAIN", 400), "evaluated", None),
        (("INPUT.MAX_SIZE_TRAIN", 500), "trained", None),  # 500x1
        (("INPUT.MAX_SIZE_TEST", 400), "trained", None),
        (("INPUT.MAX_SIZE_TEST", 400), "evaluated", "become 400x0 by INPUT.MIN_SIZE_TEST"),
        (("INPUT.MAX_SIZE_TEST", 400, "INPUT.MIN_SIZE_TEST", 0), "evaluated", None),
        (("INPUT.MAX_SIZE_TRAIN", 400, "INPUT.MIN_SIZE_TRAIN", [0]), "trained", None),
        (("INPUT.MAX_SIZE_TRAIN", 400, "INPUT.MIN_SIZE_TRAIN", [0, 64]), "trained", "become 400x0"),
        (
            (
                *("INPUT.MAX_SIZE_TRAIN", 400, "INPUT.MIN_SIZE_TRAIN", [1, 64]),
                *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
            ),
            "trained",
            "become 400x0",
        ),
        (
            ("TEST.AUG.ENABLED", True, "TEST.AUG.MAX_SIZE", 400),
            "evaluated",
            "by TEST.AUG.MIN_SIZES",
        ),
        (
            ("INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.1, 0.1]),
            "trained",
            "become 4000x0 by INPUT.CROP",
        ),
        (
            (
                "INPUT.CROP.ENABLED",
                True,
                "INPUT.CROP.TYPE",
                "relative",
                "INPUT.CROP.SIZE",
                [0.1, 1],
            ),
            "trained",
            "become 4000x0 by INPUT.CROP",
        ),
        (
            (
                *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"),
                *("INPUT.CROP.SIZE", [64, 64], "INPUT.MAX_SIZE_TRAIN", 400),
            ),
            "trained",
            None,
        ),
    ],
)
def test_images_that_are_resized_to_nothing(squares, opts, used, becomes):  # noqa: F811
    squares.image(2, **STRIP)
    cfg = squares.config(*opts)
    uses = {"trained": used == "trained", "evaluated": used == "evaluated"}
    problems = check_sizes(cfg, squares.content, **uses)
    assert len(problems) == (becomes is not None)
    if becomes:
        assert problems[0].where == "image 3 (003.png)" and problems[0].severity == "error"
        assert becomes in problems[0].detail


def test_strips_without_objects_are_not_trained_on(squares):  # noqa: F811
    squares.image(2, **STRIP)
    del squares.content["annotations"][4:6]
    cfg = squares.config("INPUT.MAX_SIZE_TRAIN", 400)
    assert check_sizes(cfg, squares.content, trained=True, evaluated=False) == []
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(check_sizes(cfg, squares.content, trained=True, evaluated=False)) == 1


def test_strips_are_named_before_training(squares):  # noqa: F811
    squares.image(2, **STRIP)
    del squares.content["annotations"][4:6]  # RLE of the old size
    strip = Image.new("RGB", (4000, 4))
    squares.content["annotations"][4].update(image_id=3, segmentation=[[0, 0, 9, 0, 9, 4, 0, 4]])
    squares.content["annotations"][4].update(bbox=[0, 0, 9, 4])
    strip.save(squares.image(2))
    cfg = squares.config("INPUT.MAX_SIZE_TRAIN", 400)
    with pytest.raises(
        DataError, match=r"instances.json cannot be used: image 3 \(003.png\): is re"
    ):
        setup_datasets(cfg)
    assert check_coco(squares.json_file, squares.root) == []
    [problem] = check_coco(squares.json_file, squares.root, cfg=cfg)
    assert problem.what == "is resized to nothing"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_in_unicode(squares, encoding, monkeypatch):  # noqa: F811
    """Whatever the locale's encoding, and in Detectron2's and pycocotools' code too."""
    squares.content["categories"][0]["name"] = "größe"
    cfg = squares.config()
    text = json.dumps(squares.content, ensure_ascii=False)
    with open(squares.json_file, "w", encoding=encoding) as f:
        f.write(text)
    original = open

    def in_ascii(path, mode="r", *args, **kwargs):
        if "b" not in mode:
            kwargs.setdefault("encoding", "ascii")
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", in_ascii)
    setup_datasets(cfg)
    assert len(DatasetCatalog.get("checked_squares")) == 4
    assert MetadataCatalog.get("checked_squares").thing_classes[0] == "größe"
    assert len(COCO(squares.json_file).anns) == 8


def test_annotations_in_another_encoding(squares):  # noqa: F811
    squares.content["categories"][0]["name"] = "größe"
    with open(squares.json_file, "w", encoding="latin-1") as f:
        json.dump(squares.content, f, ensure_ascii=False)
    with pytest.raises(DataError, match="instances.json is not a COCO.*it is not text in UTF-8"):
        check_coco(squares.json_file, squares.root)


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
