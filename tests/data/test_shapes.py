"""The drawn data set: what is in the pictures, and how they get to disk and into Detectron2."""

import json
import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO

from panet_d2.data.datasets import shapes
from panet_d2.errors import DataError

from ..common import child_env


@pytest.fixture(scope="module")
def pictures():
    return [shapes.render_image("train", i) for i in range(60)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for a data set of few images."""
    root = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setenv("PANET_D2_CACHE", str(root))
        patch.setitem(shapes.SPLITS, "train", 4)
        patch.setitem(shapes.SPLITS, "val", 2)
        _register_again()
        yield root
    _register_again()


def _register_again():
    for name in (f"{prefix}_{split}" for prefix in shapes.SIZES for split in shapes.SPLITS):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    shapes.register_shapes()


def _labels(instances, size=256):
    """0 for the background, k + 1 for instance k."""
    labels = np.zeros((size, size), int)
    for i, instance in enumerate(instances, 1):
        labels[instance["mask"]] = i
    return labels


def _long_side(mask):
    return max(np.ptp(np.nonzero(mask), axis=1)) + 1


def _components(mask, connectivity=4):
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity)[0] - 1


def _files(root):
    paths = [os.path.join(folder, f) for folder, _, names in os.walk(root) for f in names]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def test_same_arguments_give_the_same_image(pictures):
    image, instances = shapes.render_image("train", 7)
    assert image.dtype == np.uint8 and image.shape == (256, 256, 3)
    assert np.array_equal(image, pictures[7][0])
    assert [i["category"] for i in instances] == [i["category"] for i in pictures[7][1]]
    assert np.array_equal(_labels(instances), _labels(pictures[7][1]))


def test_images_differ_by_index_and_split(pictures):
    others = [pictures[1][0], shapes.render_image("val", 0)[0]]
    assert not any(np.array_equal(pictures[0][0], other) for other in others)


@pytest.mark.parametrize("args", [("test", 0), ("train", -1), ("train", 0, 32)])
def test_impossible_images_are_refused(args):
    with pytest.raises(ValueError, match="there is no image"):
        shapes.render_image(*args)


def test_other_sizes():
    image, instances = shapes.render_image("val", 3, size=128)
    assert image.shape == (128, 128, 3)
    assert instances and all(i["mask"].shape == (128, 128) for i in instances)
    assert max(_long_side(i["mask"]) for i in instances) <= 102


def test_every_class_and_every_size_occurs(pictures):
    instances = [instance for _, found in pictures for instance in found]
    counts = np.bincount([i["category"] for i in instances], minlength=len(shapes.CLASSES))
    assert len(counts) == len(shapes.CLASSES) and counts.min() >= len(instances) / 12
    sides = np.array([_long_side(i["mask"]) for i in instances])
    assert sides.min() <= 12 and sides.max() >= 150
    # Spread over the whole range, as far as occlusion lets them: no octave has half of them.
    octaves = np.histogram(np.log2(sides), [0, 4, 5, 6, 7, 8])[0] / len(sides)
    assert octaves.min() > 0.1 and octaves.max() < 0.4
    per_image = [len(found) for _, found in pictures]
    assert min(per_image) >= 2 and max(per_image) <= 16 and len(set(per_image)) > 5


def test_masks_are_disjoint_and_large_enough(pictures):
    for _, instances in pictures:
        masks = np.stack([i["mask"] for i in instances])
        assert masks.dtype == bool
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= 16


def test_masks_are_what_is_visible_in_the_image(monkeypatch):
    """With flat colours in place of textures, the image says which shape is on top where."""
    drawn = []

    def paint(rng, image, distance, category, side):
        drawn.append(side)
        image[distance < 0] = 15 * len(drawn)

    def background(rng, size):
        return np.zeros((size, size, 3), np.float32)

    monkeypatch.setattr(shapes, "_paint", paint)
    monkeypatch.setattr(shapes, "_background", background)
    overlapping = 0
    for index in range(20):
        drawn.clear()
        image, instances = shapes.render_image("val", index)
        assert len(drawn) == len(instances)
        # By the mean of the channels, which sensor noise hardly moves.
        seen = np.round(image.mean(axis=-1) / 15).astype(int)
        assert (seen == _labels(instances)).mean() > 0.999
        overlapping += any(_components(i["mask"]) > 1 for i in instances)
    assert overlapping > 2


def test_no_shape_is_hidden_too_much(monkeypatch):
    areas, place = [], shapes._place

    def recorded(rng, inside, *args):
        found = place(rng, inside, *args)
        if found is not None:
            areas.append(inside.sum())
        return found

    monkeypatch.setattr(shapes, "_place", recorded)
    shares = []
    for index in range(30):
        areas.clear()
        _, instances = shapes.render_image("val", index)
        shares += [i["mask"].sum() / area for i, area in zip(instances, areas)]
    assert min(shares) >= 0.4
    assert 0.2 < np.mean(np.array(shares) < 0.95) < 0.8


@pytest.mark.parametrize("category", range(len(shapes.CLASSES)), ids=shapes.CLASSES)
def test_shapes_are_whole_and_only_rings_have_a_hole(category):
    rng = np.random.default_rng(category)
    for side in [8, 9, 12, 20, 50, 100, 200] * 8:
        inside = shapes._draw(rng, category, side) < 0
        assert not (inside[0].any() or inside[-1].any() or inside[:, [0, -1]].any())
        assert _components(inside, 8) == 1
        assert _components(~inside) == (2 if shapes.CLASSES[category] == "ring" else 1)
        # Tips thinner than a pixel do not show.
        assert side - 4 <= _long_side(inside) <= side + 1


@pytest.mark.parametrize("side", [8, 12, 40])
def test_shapes_stand_out_from_what_is_below(side):
    rng = np.random.default_rng(side)
    for _ in range(50):
        category = rng.integers(6)
        distance = shapes._draw(rng, category, side).astype(np.float32)
        below = np.tile(rng.uniform(0, 255, 3).astype(np.float32), (*distance.shape, 1))
        image = below.copy()
        shapes._paint(rng, image, distance, category, side)
        change = np.linalg.norm(image - below, axis=-1)
        assert change[distance < -0.5].mean() > 40
        assert change[distance > shapes._pad(side)].max(initial=0) == 0


def test_classes_prefer_a_hue_and_share_hues():
    rng = np.random.default_rng(0)
    for category in range(6):
        colours = shapes._colours(rng, category, 4000)
        assert colours.shape == (4000, 3) and 0 <= colours.min() and colours.max() <= 255
        hue = cv2.cvtColor(colours[None], cv2.COLOR_RGB2HSV)[0, :, 0]
        away = np.abs((hue - 60 * category + 180) % 360 - 180)
        nearest_is_own = (away < 30).mean()
        assert 0.9 < nearest_is_own < 1


def test_files_hold_what_was_rendered(cache):
    folder = shapes.ensure_shapes()
    assert folder == str(cache / "shapes_v1")
    for split, count in {"train": 4, "val": 2}.items():
        coco = COCO(os.path.join(folder, "annotations", f"instances_{split}.json"))
        assert sorted(coco.imgs) == list(range(count))
        assert [c["name"] for c in coco.loadCats(range(1, 7))] == list(shapes.CLASSES)
        for index, entry in coco.imgs.items():
            expected, instances = shapes.render_image(split, index)
            image = cv2.imread(os.path.join(folder, split, entry["file_name"]))
            assert np.array_equal(image[..., ::-1], expected)
            annotations = coco.imgToAnns[index]
            assert len(annotations) == len(instances)
            for annotation, instance in zip(annotations, instances):
                _check_annotation(coco, annotation, instance)


def _check_annotation(coco, annotation, instance):
    mask = instance["mask"]
    assert annotation["id"] > 0 and annotation["iscrowd"] == 0
    assert annotation["category_id"] == instance["category"] + 1
    assert np.array_equal(coco.annToMask(annotation), mask)
    assert annotation["area"] == mask.sum()
    y, x = np.nonzero(mask)
    low, high = (x.min(), y.min()), (x.max() + 1, y.max() + 1)
    assert annotation["bbox"] == [*low, *np.subtract(high, low)]


def test_folder_is_the_given_one_before_the_environments(cache, tmp_path):
    assert shapes.ensure_shapes(str(tmp_path / "given")) == str(tmp_path / "given" / "shapes_v1")
    assert not cache.exists()


def test_second_call_does_nothing(cache, monkeypatch):
    folder = shapes.ensure_shapes()
    before = _files(cache)
    monkeypatch.setattr(shapes, "render_image", None)
    assert shapes.ensure_shapes() == folder
    assert _files(cache) == before and len(before) == 8


def test_remains_of_a_killed_process_are_removed(cache):
    old, new = cache / "shapes_v1.tmp-old", cache / "shapes_v1.tmp-new"
    for path in (old, new):
        (path / "train").mkdir(parents=True)
        (path / "train" / "000000.png").write_bytes(b"half an image")
    os.utime(old, (time.time() - 1e5,) * 2)
    folder = shapes.ensure_shapes()
    # The new one may belong to a process that is at work.
    assert sorted(os.listdir(cache)) == ["shapes_v1", new.name]
    assert cv2.imread(os.path.join(folder, "train", "000000.png")) is not None


def test_failure_leaves_nothing(cache, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes.json, "dump", fail)
        with pytest.raises(KeyboardInterrupt):
            shapes.ensure_shapes()
    assert os.listdir(cache) == []
    shapes.ensure_shapes()
    assert os.listdir(cache) == ["shapes_v1"]


def test_slower_of_two_processes_takes_what_is_there(cache, monkeypatch):
    write = shapes._write_split

    def overtaken(*args):
        monkeypatch.setattr(shapes, "_write_split", write)
        shapes.ensure_shapes()
        files.update(_files(cache / "shapes_v1"))
        write(*args)

    files = {}
    monkeypatch.setattr(shapes, "_write_split", overtaken)
    folder = shapes.ensure_shapes()
    assert os.listdir(cache) == ["shapes_v1"]
    assert files and _files(folder) == files


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PANET_D2_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file.*shapes_v1: .*PANET_D2_CACHE to another folder"):
        shapes.ensure_shapes()


def test_incomplete_folder_is_reported(cache):
    folder = shapes.ensure_shapes()
    os.remove(os.path.join(folder, "annotations", "instances_val.json"))
    with pytest.raises(DataError, match=r"lacks .*instances_val\.json; delete"):
        shapes.ensure_shapes()


def test_registration_draws_nothing_until_loaded(cache):
    metadata = MetadataCatalog.get("panet_shapes_val")
    assert not cache.exists()
    assert metadata.thing_classes == list(shapes.CLASSES)
    assert metadata.evaluator_type == "coco"
    expected = metadata.json_file, metadata.image_root

    records = DatasetCatalog.get("panet_shapes_val")
    assert len(records) == 2 and len(DatasetCatalog.get("panet_shapes_train")) == 4
    assert (metadata.json_file, metadata.image_root) == expected
    assert all(os.path.isfile(record["file_name"]) for record in records)
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(6))
    assert [r["annotations"] for r in load_coco_json(*expected, "panet_shapes_val")] == [
        r["annotations"] for r in records
    ]
    with open(metadata.json_file) as f:
        assert len(json.load(f)["images"]) == 2


def test_small_images_have_a_folder_of_their_own(cache):
    records = DatasetCatalog.get("panet_shapes_small_val")
    assert os.listdir(cache) == ["shapes_v1_128"]
    assert {(r["height"], r["width"]) for r in records} == {(128, 128)}
    image, _ = shapes.render_image("val", 0, 128)
    assert np.array_equal(cv2.imread(records[0]["file_name"])[..., ::-1], image)


def test_data_goes_where_the_metadata_says(cache, tmp_path, monkeypatch):
    """Also if the environment changes between registration and use."""
    monkeypatch.setenv("PANET_D2_CACHE", str(tmp_path / "later"))
    DatasetCatalog.get("panet_shapes_val")
    assert os.path.isfile(MetadataCatalog.get("panet_shapes_val").json_file)
    _register_again()
    assert MetadataCatalog.get("panet_shapes_val").json_file.startswith(str(tmp_path / "later"))
    assert not (tmp_path / "later").exists()


def test_a_dataset_of_the_same_name_stays():
    users = []
    DatasetCatalog.remove("panet_shapes_val")
    DatasetCatalog.register("panet_shapes_val", lambda: users)
    try:
        shapes.register_shapes()
        assert DatasetCatalog.get("panet_shapes_val") is users
    finally:
        _register_again()


def test_importing_replaces_no_dataset():
    """In a process of its own: here the package was imported before."""
    script = """
from detectron2.data import DatasetCatalog
names = ["shapes_train", "shapes_val", "panet_shapes_train", "panet_shapes_val"]
for name in names:
    DatasetCatalog.register(name, lambda name=name: [name])
import panet_d2
assert [DatasetCatalog.get(name) for name in names] == [[name] for name in names]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=child_env())
