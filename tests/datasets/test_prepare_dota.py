import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from panet_d2 import cli
from panet_d2.data import check_coco
from panet_d2.errors import DataError

from ..common import load_script

tool = load_script("datasets/prepare_dota.py")

# Corners, class and difficult. The ship is cut by a tile's border, the bridge stands at an angle.
OBJECTS = [
    ([20, 20, 60, 20, 60, 40, 20, 40], "plane", 0),
    ([70, 50, 150, 50, 150, 70, 70, 70], "ship", 0),
    ([200, 120, 230, 90, 240, 100, 210, 130], "bridge", 0),
    ([10, 100, 30, 100, 30, 110, 10, 110], "small-vehicle", 1),
]


def write_image(folder, name, objects=OBJECTS, size=(250, 180)):
    for kind in ("images", "labelTxt"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    lines = ["imagesource:GoogleEarth", "gsd:0.146"]
    for i, (corners, category, difficult) in enumerate(objects):
        ImageDraw.Draw(image).polygon(corners, fill=(0, 0, 50 * (i + 1)))
        lines.append(" ".join(f"{float(c)}" for c in corners) + f" {category} {difficult}")
    image.save(folder / f"images/{name}.png")
    (folder / f"labelTxt/{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def source(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / "DOTA" / split, "P0001")
        write_image(tmp_path / "DOTA" / split, "P0002", [], (50, 60))
    return tmp_path / "DOTA"


def prepare(source, tmp_path):
    counts = tool.prepare_dota(str(source), str(tmp_path / "datasets"), size=100, overlap=20)
    folder = tmp_path / "datasets/dota/annotations"
    return counts, {f.stem: json.loads(f.read_text()) for f in folder.iterdir()}


def tiles(content):
    """Each image of a file with its annotations."""
    for image in content["images"]:
        yield image, [a for a in content["annotations"] if a["image_id"] == image["id"]]


def test_upright_boxes(source, tmp_path):
    counts, contents = prepare(source, tmp_path)
    assert counts["dota_train"][0] == 3 * 2 + 1
    for split in ("train", "val"):
        seen = set()
        for image, annotations in tiles(contents[split]):
            pixels = np.array(Image.open(tmp_path / "datasets/dota" / split / image["file_name"]))
            assert pixels.shape[:2] == (image["height"], image["width"])
            for a in annotations:
                name = tool.CLASSES[a["category_id"] - 1]
                i = [category for _, category, _ in OBJECTS].index(name)
                ys, xs = np.nonzero(pixels[..., 2] == 50 * (i + 1))
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                x, y, w, h = a["bbox"]
                assert np.abs(np.subtract([x, y, x + w, y + h], box)).max() <= 1
                seen.add((name, a["iscrowd"]))
        assert {("plane", 0), ("bridge", 0), ("ship", 0), ("ship", 1)} <= seen
        assert ("small-vehicle", int(split == "val")) in seen


def corners(x, y, width, height, angle):
    """As in Detectron2's Visualizer."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    sides = np.array([[-1, 1], [-1, -1], [1, -1], [1, 1]]) * [width / 2, height / 2]
    return [[s * dy + c * dx + x, c * dy - s * dx + y] for dx, dy in sides]


def test_oriented_boxes(source, tmp_path):
    _, contents = prepare(source, tmp_path)
    for split in ("train", "val"):
        names = set()
        for image, annotations in tiles(contents[f"oriented_{split}"]):
            x, y = map(int, image["file_name"][:-4].split("_")[1:])
            for a in annotations:
                name = tool.CLASSES[a["category_id"] - 1]
                names.add(name)
                expected = next(c for c, category, _ in OBJECTS if category == name)
                found = np.array(corners(*a["bbox"])) + [x, y]
                expected = np.reshape(expected, (4, 2))
                apart = np.linalg.norm(found[:, None] - expected, axis=2)
                assert (apart.min(0) < 1e-6).all() and (apart.min(1) < 1e-6).all()
                assert a["bbox"][2] >= a["bbox"][3] and -90 <= a["bbox"][4] < 90
                assert not a["iscrowd"]
        assert names == {category for _, category, _ in OBJECTS}


def test_a_box_that_is_no_rectangle():
    points = np.array([[0, 0], [40, 10], [38, 22], [-2, 9]], float)
    x, y, w, h, angle = tool.oriented_box(points)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    local = (points - [x, y]) @ np.array([[c, s], [-s, c]])
    assert np.abs(local).max(0) == pytest.approx([w / 2, h / 2])


@pytest.mark.parametrize("file", ["train", "val", "oriented_train", "oriented_val"])
def test_passes_the_check(source, tmp_path, file):
    prepare(source, tmp_path)
    folder = tmp_path / "datasets/dota"
    problems = check_coco(
        str(folder / f"annotations/{file}.json"), str(folder / file.split("_")[-1])
    )
    assert [str(p) for p in problems if p.severity == "error"] == []


def _no_labels(folder):
    (folder / "labelTxt/P0001.txt").unlink()


def _no_image(folder):
    (folder / "images/P0001.png").unlink()


def _two_labels(folder):
    (folder / "labelTxt-v1.5").mkdir()
    (folder / "labelTxt-v1.5/P0001.txt").write_text("")


def _nothing(folder):
    (folder / "images").rename(folder.parent / "elsewhere")


def _broken_image(folder):
    (folder / "images/P0001.png").write_bytes(b"PNG")


def _latin(folder):
    (folder / "labelTxt/P0001.txt").write_bytes("Größe".encode("latin-1"))


def _labels(text):
    def spoil(folder):
        (folder / "labelTxt/P0001.txt").write_text("gsd:null\n" + text)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_no_labels, "val: image P0001 has no labelTxt/P0001.txt"),
        (_no_image, "val: image P0001 has no P0001.png"),
        (_two_labels, "P0001 has two files: .*labelTxt/P0001.txt and .*v1.5/P0001.txt"),
        (_nothing, "val has no images/<image>.png; names"),
        (_latin, "P0001.txt is not text in UTF-8"),
        (_broken_image, "cannot read .*P0001.png"),
        (_labels("1 2 3 4 5 6 7 8 plane"), "P0001.txt: line 2 is '1 2 3 4 5 6 7 8 plane'; it must"),
        (_labels("1 2 3 4 5 6 7 plane 0"), "line 2 is"),
        (_labels("1 2 3 4 5 6 7 nan plane 0"), "line 2 is"),
        (_labels("1 2 3 4 5 6 7 8 plane 2"), "line 2 is"),
        (_labels("1 2 3 4 5 6 7 8 airport 0"), "line 2 has the class 'airport'"),
    ],
)
def test_what_is_wrong_is_named(source, tmp_path, spoil, message):
    spoil(source / "val")
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path)
    assert not list(tmp_path.glob("datasets/*"))


def test_counts_and_errors(source, tmp_path, capsys):
    args = [str(source), "--root", str(tmp_path / "datasets"), "--size", "300"]
    assert cli.run(tool.main, args) == 0
    printed = capsys.readouterr().out
    assert "dota_train: 2 tiles, 4 objects" in printed
    assert "dota_val: 2 tiles, 3 objects" in printed  # one is difficult
    assert "dota_oriented_val: 2 tiles, 4 objects" in printed
    assert cli.run(tool.main, args) == 1
    assert "dota is there already" in capsys.readouterr().err
