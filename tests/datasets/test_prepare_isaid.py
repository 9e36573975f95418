import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from panet_d2 import cli
from panet_d2.data import check_coco
from panet_d2.errors import DataError

from ..common import load_script

tool = load_script("datasets/prepare_isaid.py")
COLORS = {name: color for color, name in tool.CLASSES.items()}
# Left, top, right, bottom. The vehicle is cut by a tile's border; the harbor has a hole.
OBJECTS = [
    ("plane", (10, 10, 30, 25)),
    ("Small_Vehicle", (70, 40, 130, 52)),
    ("Harbor", (140, 90, 180, 140)),
]
HOLE = (150, 100, 160, 110)


def write(folder, name, size=(190, 150)):
    pictures = {
        "images": np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)),
        "Instance_masks/images": np.zeros((size[1], size[0], 3)),
        "Semantic_masks/images": np.zeros((size[1], size[0], 3)),
    }
    _, ids, classes = pictures.values()
    for i, (category, (x0, y0, x1, y1)) in enumerate(OBJECTS, 1):
        ids[y0:y1, x0:x1] = (i, 0, 255 - i)
        classes[y0:y1, x0:x1] = COLORS[category]
    x0, y0, x1, y1 = HOLE
    ids[y0:y1, x0:x1] = classes[y0:y1, x0:x1] = 0
    ids[:3, :3] = 9  # an object without a class
    for (where, pixels), suffix in zip(
        pictures.items(), (".png", "_instance_id_RGB.png", "_instance_color_RGB.png")
    ):
        (folder / where).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / where / f"{name}{suffix}")


@pytest.fixture
def source(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "iSAID" / split, "P0003")
    return tmp_path / "iSAID"


def prepare(source, tmp_path):
    return tool.prepare_isaid(str(source), str(tmp_path / "datasets"), size=100, overlap=20)


def test_every_pixel_arrives(source, tmp_path):
    counts = prepare(source, tmp_path)
    assert counts["isaid_train"] == counts["isaid_val"] and counts["isaid_val"][0] == 3 * 2
    pixels = np.array(Image.open(source / "train/images/P0003.png"))
    content = json.loads((tmp_path / "datasets/isaid/annotations/train.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    whole = {name: np.zeros(pixels.shape[:2], bool) for name, _ in OBJECTS}
    for image in content["images"]:
        x, y = map(int, image["file_name"][:-4].split("_")[1:])
        area = np.s_[y : y + image["height"], x : x + image["width"]]
        tile = np.array(Image.open(tmp_path / "datasets/isaid/train" / image["file_name"]))
        assert np.array_equal(tile, pixels[area])
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                mask = mask_util.decode(a["segmentation"]).astype(bool)
                assert a["area"] == mask.sum() and a["bbox"] == list(
                    mask_util.toBbox(a["segmentation"])
                )
                whole[names[a["category_id"]]][area] |= mask
    for name, (x0, y0, x1, y1) in OBJECTS:
        expected = np.zeros_like(whole[name])
        expected[y0:y1, x0:x1] = True
        expected[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = False
        assert np.array_equal(whole[name], expected)


@pytest.mark.parametrize("split", ["train", "val"])
def test_passes_the_check(source, tmp_path, split):
    prepare(source, tmp_path)
    folder = tmp_path / "datasets/isaid"
    problems = check_coco(str(folder / f"annotations/{split}.json"), str(folder / split))
    assert [str(p) for p in problems if p.severity == "error"] == []


def _no_ids(folder):
    (folder / "Instance_masks/images/P0003_instance_id_RGB.png").unlink()


def _no_image(folder):
    (folder / "images/P0003.png").rename(folder / "images/P0004.png")


def _other_size(folder):
    Image.new("RGB", (5, 6)).save(folder / "Instance_masks/images/P0003_instance_id_RGB.png")


def _other_color(folder):
    path = folder / "Semantic_masks/images/P0003_instance_color_RGB.png"
    pixels = np.array(Image.open(path))
    pixels[10:25, 10:30] = (1, 2, 3)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_no_ids, "val: image P0003 has no P0003_instance_id_RGB.png"),
        (_no_image, "val: image P0003 has no P0003.png"),
        (_other_size, "P0003_instance_id_RGB.png is 5x6, and its image 190x150"),
        (_other_color, r"P0003_instance_color_RGB.png has the color \(1, 2, 3\)"),
    ],
)
def test_what_is_wrong_is_named(source, tmp_path, spoil, message):
    spoil(source / "val")
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path)
    assert not list(tmp_path.glob("datasets/*"))


def test_counts(source, tmp_path, capsys):
    args = [str(source), "--root", str(tmp_path / "datasets")]
    assert cli.run(tool.main, args) == 0
    assert "isaid_train: 1 tiles, 3 objects" in capsys.readouterr().out
