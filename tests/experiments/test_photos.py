import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from experiments import photos
from panet_d2 import cli
from panet_d2.engine import setup_config

from ..common import ROOT

SIDE = 100


def rle(x, y, side):
    bitmap = np.zeros((SIDE, SIDE), np.uint8, order="F")
    bitmap[y : y + side, x : x + side] = 1
    encoded = masks.encode(bitmap)
    return {**encoded, "counts": encoded["counts"].decode()}


def dataset(names, copies=1):
    """Each photo has two crops, with a square of 10 and two of 40 pixels. Two classes."""
    data = {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}], "images": []}
    data["annotations"] = []
    for photo in names:
        for crop in (f"{photo}_left", f"{photo}_right"):
            for copy in range(copies):
                number = len(data["images"]) + 1
                size = {"height": SIDE, "width": SIDE}
                image = {"id": number, "file_name": f"{crop}_{copy}.jpg", "photo": photo}
                data["images"].append({**image, **size, "crop": crop})
                for x, y, side, category in ((0, 0, 10, 1), (20, 0, 40, 1), (20, 50, 40, 2)):
                    annotation = {"id": len(data["annotations"]) + 1, "image_id": number}
                    annotation.update(category_id=category, area=side * side, iscrowd=0)
                    annotation.update(bbox=[x, y, side, side], segmentation=rle(x, y, side))
                    data["annotations"].append(annotation)
    return data


def detections(data, smaller=0, photos=None):
    """Each object of the photos, its mask some pixels smaller, with a score of its own."""
    of_image = {image["id"]: image["photo"] for image in data["images"]}
    found = []
    for a in data["annotations"]:
        if photos is None or of_image[a["image_id"]] in photos:
            x, y, side, _ = a["bbox"]
            found.append({"image_id": a["image_id"], "category_id": a["category_id"]})
            found[-1]["bbox"] = a["bbox"]  # Detectron2's results have both
            found[-1].update(segmentation=rle(x, y, side - smaller), score=1 - a["id"] / 1000)
    return found


def test_folds_keep_photos_together():
    data = dataset("abcdefgh", copies=3)
    folds = photos.make_folds(data, 4)
    validated = Counter()
    for train, val in folds:
        both = [{image["photo"] for image in part["images"]} for part in (train, val)]
        assert not both[0] & both[1] and len(both[1]) == 2
        assert len(train["images"]) == 6 * 2 * 3  # all copies are trained
        assert {a["image_id"] for a in val["annotations"]} == {i["id"] for i in val["images"]}
        validated.update(image["crop"] for image in val["images"])
    assert set(validated.values()) == {1} and len(validated) == 16  # one copy of each crop


def test_folds_have_about_the_same_number_of_objects():
    data = dataset("abc")
    extra = [
        a for a in data["annotations"] if a["image_id"] <= 2
    ]  # photo a has three times as many
    data["annotations"] += [{**a, "id": 1000 + 10 * i + a["id"]} for i in range(2) for a in extra]
    folds = photos.make_folds(data, 2)
    assert sorted(len(val["annotations"]) for _, val in folds) == [12, 18]


@pytest.mark.parametrize("number", [1, 3])
def test_number_of_folds(number):
    with pytest.raises(photos.DataError, match=f"2 photos cannot be split into {number} folds"):
        photos.make_folds(dataset("ab"), number)


def test_ap_is_that_of_coco():
    data = dataset("abcd")
    found = detections(data, smaller=1, photos="abc")
    result = photos.compare(data, {"a": {1: found}, "b": {1: found}}, "a", 100, draws=20)
    coco = COCO()
    coco.dataset = data
    coco.createIndex()
    reference = COCOeval(coco, coco.loadRes(found), "segm")
    reference.evaluate(), reference.accumulate(), reference.summarize()
    model = result["models"]["a"]
    assert model["seeds"][1] == pytest.approx(100 * reference.stats[0])
    assert model["AP all"] == pytest.approx(100 * reference.stats[0])
    assert model["AP75"] == pytest.approx(100 * reference.stats[2])
    assert result["photos"] == 4 and result["images"] == 8
    difference = result["differences"]["b"]
    assert [difference[k] for k in ("mean", "low", "high")] == [0, 0, 0]  # drawn in pairs


def test_sizes_are_relative_to_the_image():
    """A square of 10 beside two of 40: a quarter of the usual side. Only it is found."""
    data = dataset("abcd")
    small = [d for d in detections(data) if masks.area(d["segmentation"]) == 100]
    model = photos.compare(data, {"m": {1: small}}, "m", 100, draws=2)["models"]["m"]
    assert model["AP smaller"] == pytest.approx(100)
    assert model["AP similar"] == 0
    assert np.isnan(model["AP larger"])  # there are none


def test_false_positives_have_the_size_of_their_masks():
    """Also in images without objects, where the size is relative to the objects of the others."""
    data = dataset("abcd")
    empty = {"id": 99, "file_name": "empty.jpg", "photo": "e", "height": SIDE, "width": SIDE}
    data["images"].append(empty)
    found = detections(data)
    wrong = {
        "category_id": 1,
        "score": 2.0,
        "bbox": [0, 0, 90, 90],
        "segmentation": rle(60, 60, 38),
    }
    for image in data["images"]:
        found.append({**wrong, "image_id": image["id"]})
    model = photos.compare(data, {"m": {1: found}}, "m", 100, draws=2)["models"]["m"]
    assert model["AP smaller"] == pytest.approx(100)  # the box would be "larger", the mask is not
    assert model["AP similar"] < 90


def test_interval_over_photos():
    """Better in each photo: the interval is above zero. Better in one of eight: it is not."""
    data = dataset("abcdefgh")
    rough, exact = detections(data, smaller=4), detections(data)
    better = {s: exact for s in (1, 2)}
    one = [d for d in rough if d["image_id"] > 2] + [d for d in exact if d["image_id"] <= 2]
    runs = {"base": {1: rough, 2: rough}, "all": better, "one": {1: one, 3: one}, "none": {1: []}}
    result = photos.compare(data, runs, "base", 100, draws=60)["differences"]
    assert result["all"]["low"] > 5 and result["all"]["seeds"] == [1, 2]
    assert result["one"]["seeds"] == [1] and result["one"]["high"] > result["one"]["mean"] > 0
    assert result["one"]["low"] == 0  # some draws miss the photo
    assert result["none"]["high"] < 0


def test_some_categories():
    """Class a is exact and class b is not."""
    data = dataset("abcd")
    rough = detections(data, smaller=8)
    mixed = [d for d in detections(data) if d["category_id"] == 1]
    mixed += [d for d in rough if d["category_id"] == 2]
    runs = {"base": {1: rough}, "ours": {1: mixed}}
    of = {
        name: photos.compare(data, runs, "base", 100, draws=2, categories=[name]) for name in "ab"
    }
    assert of["a"]["models"]["ours"]["AP all"] == pytest.approx(100)
    assert of["a"]["differences"]["ours"]["low"] > 10
    assert of["b"]["differences"]["ours"]["mean"] == 0
    assert of["b"]["categories"] == ["b"]
    with pytest.raises(photos.DataError, match="category c does not exist; there are a, b"):
        photos.compare(data, runs, "base", 100, categories=["a", "c"])


def test_other_units():
    """All photos of one building are drawn together, or none is: nothing varies."""
    data = dataset("abcdefgh")
    runs = {"base": {1: detections(data)}, "ours": {1: detections(data, photos="abc")}}
    for image in data["images"]:
        image["building"] = 7
    result = photos.compare(data, runs, "base", 100, draws=20, unit="building")
    assert result["buildings"] == 1
    difference = result["differences"]["ours"]
    assert difference["low"] == pytest.approx(difference["mean"]) == difference["high"]
    del data["images"][3]["building"]
    with pytest.raises(photos.DataError, match="b_right_0.jpg has no field building"):
        photos.compare(data, runs, "base", 100, unit="building")


def test_own_validation_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/fronts/annotations"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    command = ["compare", "--dataset", "fronts", "--number", "1", "--models", "base", "ours"]
    command += ["--seeds", "1", "--draws", "5", "--output", "result.json", "--categories", "a"]
    assert cli.run(photos.main, command) == 1
    assert "instances_val.json does not exist" in capsys.readouterr().err
    data = dataset("abc")
    (folder / "instances_val.json").write_text(json.dumps(data))
    for model, smaller in (("base", 4), ("ours", 0)):
        run = tmp_path / f"output/ablation/fronts/{model}_seed1/inference"
        run.mkdir(parents=True)
        (run / "coco_instances_results.json").write_text(json.dumps(detections(data, smaller)))
    assert cli.run(photos.main, [*command, "--unit", "crop"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["crops"] == 6 and result["categories"] == ["a"]
    assert result["differences"]["ours"]["low"] > 0


def test_from_folds_to_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/stones/annotations"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    command = ["--dataset", "stones", "--number", "2", "--folds", "folds"]
    base = ["--base", str(ROOT / "configs/Granular/panet_R_18_FPN.yaml")]
    assert cli.run(photos.main, ["folds", *command, *base]) == 1
    assert "instances_train.json does not exist" in capsys.readouterr().err
    (folder / "instances_train.json").write_text(json.dumps(dataset("abc")))
    (folder / "instances_val.json").write_text(json.dumps(dataset("d")))
    assert cli.run(photos.main, ["folds", *command, *base]) == 0
    assert "fold2_val.json: 4 images of photos" in capsys.readouterr().out
    cfg = setup_config("folds/stones/fold2.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", 2], needed=())
    assert cfg.DATASETS.TEST == ("stones_fold2_val",)
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_pafpn_backbone"
    (_, path, images), _ = cfg.DATASETS.REGISTER_COCO
    assert Path(path).name == "fold2_train.json" and images == str(tmp_path / "data/stones")
    compare = ["compare", *command, "--models", "base", "ours", "--seeds", "1", "--draws", "5"]
    compare += ["--output", "out/result.json"]
    assert cli.run(photos.main, compare) == 1
    assert "train base with seed 1 first" in capsys.readouterr().err
    for fold in (1, 2):
        val = json.loads((tmp_path / f"folds/stones/fold{fold}_val.json").read_text())
        assert {image["file_name"].split("/")[0] for image in val["images"]} <= {"train", "val"}
        for model, smaller in (("base", 4), ("ours", 0)):
            run = tmp_path / f"output/ablation/stones_fold{fold}/{model}_seed1/inference"
            run.mkdir(parents=True)
            (run / "coco_instances_results.json").write_text(json.dumps(detections(val, smaller)))
    assert cli.run(photos.main, compare) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["models"]["ours"]["AP90"] == pytest.approx(100)
    assert result["differences"]["ours"]["low"] > 0
    printed = capsys.readouterr().out
    assert re.search(r"ours +\| 100\.0 +\| \+\d", printed) and "| from base" in printed
    assert Image.open(tmp_path / "out/result.png").size == (1200, 480)


def test_sizes_are_sides():
    """Six tenths of the usual side are more than a half: similar."""
    data = dataset("ab")
    for a in data["annotations"]:
        if a["area"] == 100:
            a.update(area=24 * 24, bbox=[70, 0, 24, 24], segmentation=rle(70, 0, 24))
    model = photos.compare(data, {"m": {1: detections(data)}}, "m", 100, draws=2)["models"]["m"]
    assert model["AP similar"] == pytest.approx(100) and np.isnan(model["AP smaller"])


def test_limit_of_detections():
    """One detection of an image and class: the other of class a is lost."""
    data = dataset("ab")
    runs = {"m": {1: detections(data)}}
    few, all_ = (
        photos.compare(data, runs, "m", limit, draws=2)["models"]["m"]["AP all"] for limit in (1, 2)
    )
    assert few < 80 and all_ == pytest.approx(100)


def test_interval_of_95_percent(monkeypatch):
    data, asked = dataset("ab"), []
    monkeypatch.setattr(
        photos.np, "nanquantile", lambda sample, q: asked.append((len(sample), list(q))) or q
    )
    runs = {name: {1: detections(data)} for name in ("base", "ours")}
    photos.compare(data, runs, "base", 100, draws=7)
    assert asked == [(7, [0.025, 0.975])]


def test_the_usual_side_is_the_median():
    """The side of 60 is three times the usual 20, which one large object does not change."""
    data = dataset("ab")
    for i, a in enumerate(data["annotations"]):
        x, y, side = ((0, 0, 20), (30, 0, 20), (0, 30, 60))[i % 3]
        a.update(area=side**2, bbox=[x, y, side, side], segmentation=rle(x, y, side))
    model = photos.compare(data, {"m": {1: detections(data)}}, "m", 100, draws=2)["models"]["m"]
    assert model["AP larger"] == model["AP similar"] == pytest.approx(100)


def test_each_draw_has_as_many_photos(monkeypatch):
    """Each draw has as many photos as there are: here four of two images each."""
    data, drawn = dataset("abcd"), []
    real = photos._Evaluated.precision

    def precision(self, images=None, *args):
        if images is not None:
            drawn.append(len(images))
        return real(self, images, *args)

    monkeypatch.setattr(photos._Evaluated, "precision", precision)
    photos.compare(data, {"m": {1: detections(data)}}, "m", 100, draws=3)
    assert drawn == [8, 8, 8]


def test_false_positives_of_images_without_objects():
    """A false positive in an image without objects counts among those of the others' usual size."""
    data = dataset("abcd")
    data["images"].append(
        {"id": 99, "file_name": "empty.jpg", "photo": "e", "height": SIDE, "width": SIDE}
    )
    wrong = {"image_id": 99, "category_id": 1, "score": 2.0, "segmentation": rle(60, 60, 38)}
    found = [*detections(data), wrong]
    model = photos.compare(data, {"m": {1: found}}, "m", 100, draws=2)["models"]["m"]
    assert model["AP similar"] < 99 and model["AP smaller"] == pytest.approx(100)


def test_the_difference_is_of_all_seeds():
    """All photos are one unit, so nothing varies; one of two seeds is better."""
    data = dataset("abcd")
    for image in data["images"]:
        image["building"] = 7
    rough, exact = detections(data, smaller=4), detections(data)
    runs = {"base": {1: rough, 2: rough}, "ours": {1: exact, 2: rough}}
    d = photos.compare(data, runs, "base", 100, draws=2, unit="building")["differences"]["ours"]
    assert d["low"] == pytest.approx(d["mean"]) == d["high"]
