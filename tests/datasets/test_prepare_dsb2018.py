import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from panet_d2 import cli
from panet_d2.errors import DataError

from ..common import load_script

tool = load_script("datasets/prepare_dsb2018.py")
prepare_dsb2018 = tool.prepare_dsb2018


@pytest.fixture
def source(tmp_path):
    """Thirty images of the competition's layout, of several sizes, with an empty mask each."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "stage1_train"
    truth = {}
    for i in range(30):
        name, size = f"{i:064x}", (20 + i, 30)
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
        rgba = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
        rgba[..., 3] = 255
        Image.fromarray(rgba).save(folder / name / "images" / f"{name}.png")
        masks = []
        for j in range(3):
            mask = np.zeros(size, bool)
            mask[j * 5 : j * 5 + 4, i % 7 : i % 7 + 3 + j] = True
            masks.append(mask)
        for j, mask in enumerate([*masks, np.zeros(size, bool)]):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name / f"masks/{j}.png")
        truth[f"{name}.png"] = (rgba[..., :3], masks)
    return folder, truth


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_every_pixel_arrives(source, tmp_path, zipped):
    folder, truth = source
    if zipped:
        folder = shutil.make_archive(str(tmp_path / "stage1_train"), "zip", folder)
    counts = prepare_dsb2018(str(folder), str(tmp_path / "datasets"))
    assert counts["train"][0] + counts["val"][0] == 30 and counts["val"][0] >= 1
    seen = set()
    for split, (images, nuclei) in counts.items():
        base = tmp_path / "datasets/dsb2018"
        content = json.loads((base / f"annotations/instances_{split}.json").read_text())
        assert (len(content["images"]), len(content["annotations"])) == (images, nuclei)
        assert nuclei == 3 * images  # the empty masks are left out
        for image in content["images"]:
            pixels, masks = truth[image["file_name"]]
            seen.add(image["file_name"])
            assert np.array_equal(Image.open(base / split / image["file_name"]), pixels)
            assert (image["height"], image["width"]) == pixels.shape[:2]
            ours = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            for annotation, mask in zip(ours, masks):
                assert np.array_equal(mask_util.decode(annotation["segmentation"]), mask)
                ys, xs = np.nonzero(mask)
                box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert annotation["bbox"] == box and annotation["area"] == mask.sum()
    assert seen == truth.keys()


def test_linked_folders(source, tmp_path):
    folder, truth = source
    (tmp_path / "links").mkdir()
    for image in folder.iterdir():
        (tmp_path / "links" / image.name).symlink_to(image)
    counts = prepare_dsb2018(str(tmp_path / "links"), str(tmp_path / "datasets"))
    assert sum(images for images, _ in counts.values()) == len(truth)


def test_the_split_depends_on_names_alone(source, tmp_path):
    folder, _ = source
    prepare_dsb2018(str(folder), str(tmp_path / "a"))
    shutil.rmtree(folder / f"{3:064x}")
    prepare_dsb2018(str(folder), str(tmp_path / "b"))
    for split in ("train", "val"):
        first, second = (set(os.listdir(tmp_path / x / "dsb2018" / split)) for x in "ab")
        assert first - second <= {f"{3:064x}.png"} and second <= first


def test_what_is_there_is_left_alone(source, tmp_path):
    folder, _ = source
    (tmp_path / "dsb2018").mkdir()
    with pytest.raises(FileExistsError, match="dsb2018 is there already"):
        prepare_dsb2018(str(folder), str(tmp_path))


def _no_masks(folder, image):
    shutil.rmtree(folder / image / "masks")


def _two_pictures(folder, image):
    shutil.copy(folder / image / f"images/{image}.png", folder / image / "images/b.png")


def _broken_picture(folder, image):
    (folder / image / f"images/{image}.png").write_bytes(b"")


def _broken_mask(folder, image):
    (folder / image / "masks/1.png").write_bytes(b"PNG")


def _deep_picture(folder, image):
    Image.new("I;16", (30, 27)).save(folder / image / f"images/{image}.png")


def _mask_of_ones(folder, image):
    Image.new("L", (30, 27), 1).save(folder / image / "masks/1.png")


def _mask_of_another_size(folder, image):
    Image.new("L", (5, 5)).save(folder / image / "masks/1.png")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_no_masks, "has no masks"),
        (_two_pictures, "has 2 pictures"),
        (_broken_picture, "cannot read .*images"),
        (_broken_mask, "cannot read .*masks/1.png"),
        (_mask_of_another_size, "masks/1.png is 5x5, not 30x27"),
        (_deep_picture, "images/.* has more than 8 bits"),
        (_mask_of_ones, "masks/1.png has no value above 127"),
    ],
)
def test_what_is_wrong_is_named(source, tmp_path, spoil, message):
    folder, _ = source
    spoil(folder, f"{7:064x}")
    with pytest.raises(DataError, match=message) as e:
        prepare_dsb2018(str(folder), str(tmp_path / "datasets"))
    assert f"{7:064x}" in str(e.value)
    assert not list(tmp_path.glob("datasets/*"))


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_damaged_zip(source, tmp_path, kind):
    """One byte of one file is another, as after a bad download."""
    folder, _ = source
    path = shutil.make_archive(str(tmp_path / "stage1_train"), "zip", folder)
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if f"/{kind}/" in i.filename and i.file_size)
    with open(path, "r+b") as f:
        f.seek(info.header_offset + 30 + len(info.filename) + info.compress_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0xFF]))
    with pytest.raises(DataError, match=f"cannot read .*{kind}/"):
        prepare_dsb2018(path, str(tmp_path / "datasets"))


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_no_source(tmp_path, content):
    path = tmp_path / "stage1_train.zip"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match="neither a folder nor a zip file"):
        prepare_dsb2018(str(path), str(tmp_path))


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no <image>"):
        prepare_dsb2018(str(tmp_path / "empty"), str(tmp_path))


def test_counts_and_errors(source, tmp_path, capsys, monkeypatch):
    folder, _ = source
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    assert cli.run(tool.main, [str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "dsb2018_train: 29 images, 87 nuclei" in printed
    assert (tmp_path / "datasets/dsb2018/annotations/instances_val.json").is_file()
    assert cli.run(tool.main, [str(folder)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("encrypted"), NotImplementedError("method 9")])
def test_a_zip_that_python_cannot_read(source, tmp_path, monkeypatch, error):
    folder, _ = source
    path = shutil.make_archive(str(tmp_path / "stage1_train"), "zip", folder)

    def read(*_):
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(DataError, match=f"cannot read .*images/.*png: {error}"):
        prepare_dsb2018(path, str(tmp_path / "datasets"))
