import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from panet_d2 import cli

from ..common import load_script, tiny_cfg, write_coco

STAGES = ["anchors", "proposals", "boxes", "masks", "classes"]

diagnose = load_script("tools/diagnose.py")


def write_run(folder, *opts):
    json_file, root = write_coco(folder / "squares")
    name = f"diagnosed_{folder.name}"
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [[name, json_file, root]]),
        *("DATASETS.TEST", [name]),
        *("OUTPUT_DIR", str(folder / "run")),
        *opts,
    )
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    if hasattr(model, "roi_heads"):
        kill_a_quarter(model.roi_heads.box_head)
    torch.save({"model": model.state_dict()}, folder / "run/model_final.pth")
    return str(folder / "run/config.yaml")


def kill_a_quarter(box_head):
    with torch.no_grad():
        box_head.fc1.bias[:12] = -1e4
        box_head.fc1.bias[12:] = 1e4


def test_what_it_says(tmp_path, capsys):
    command = ["--config-file", write_run(tmp_path), "--number", "2"]
    assert cli.run(diagnose.main, [*command, "--output", str(tmp_path / "new/found.json")]) == 0
    out = capsys.readouterr().out
    assert "box_head: 25 % of 48 outputs are zero for all proposals of 2 images" in out
    assert re.search(r"^AP [\d.]+  AP50 [\d.]+  AP75 [\d.]+  APs", out, re.M)
    table = [line.split() for line in out.splitlines()]
    assert ["all", "small", "medium", "large"] in table
    assert [row[0] for row in table if row[-2:] == ["-", "-"]] == STAGES  # no such objects
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert found["dead units"] == {"box_head": 25} and list(found["recall"]) == STAGES
    for stage, shares in found["recall"].items():
        values = [f"{v:.1f}" if v is not None else "-" for v in shares.values()]
        assert [stage, *values] in table
    ap = found["mask AP with"]["ground-truth boxes and classes"]
    assert f"AP {ap['AP']:.1f}  AP50 {ap['AP50']:.1f}" in out and ap["APl"] is None


def test_a_model_without_masks(tmp_path, capsys):
    config = write_run(tmp_path, "MODEL.MASK_ON", False)
    assert cli.run(diagnose.main, ["--config-file", config]) == 0
    out = capsys.readouterr().out
    assert "AP" not in out and "\nboxes " in out and "\nmasks " not in out


def test_a_model_without_roi_heads(tmp_path, capsys):
    config = write_run(
        tmp_path,
        *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 3),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    )
    assert cli.run(diagnose.main, ["--config-file", config]) == 1
    assert "no box head" in capsys.readouterr().err


def test_boxes_of_another_run(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert cli.run(diagnose.main, ["--config-file", config, "--boxes-of", other]) == 0
    *_, what, ap = capsys.readouterr().out.splitlines()
    assert (
        what == f"mask AP on diagnosed_a with the boxes, classes and scores of {other}:"
        and re.match(r"AP [\d.]+  AP50 ", ap)
    )
    (tmp_path / "c").mkdir()
    smaller = write_run(tmp_path / "c", "INPUT.MIN_SIZE_TEST", 50)
    assert cli.run(diagnose.main, ["--config-file", config, "--boxes-of", smaller]) == 1
    assert re.search(r"INPUT.MIN_SIZE_TEST is \d+, but 50 in ", capsys.readouterr().err)
    (tmp_path / "d").mkdir()
    renamed = write_run(tmp_path / "d", "DATASETS.CATEGORIES", [[1, "x"], [2, "y"], [3, "z"]])
    ours = ("DATASETS.CATEGORIES", [[i + 1, f"class{i}"] for i in range(3)])
    (tmp_path / "e").mkdir()
    command = ["--config-file", write_run(tmp_path / "e", *ours), "--boxes-of", renamed]
    assert cli.run(diagnose.main, command) == 1
    assert (
        "DATASETS.CATEGORIES names class0, class1, class2, but x, y, z in "
        in capsys.readouterr().err
    )
    moved = tmp_path / "b/config.yaml"
    text = Path(config).read_text()
    moved.write_text(text.replace(str(tmp_path / "a/squares"), str(tmp_path / "b/squares")))
    assert cli.run(diagnose.main, ["--config-file", config, "--boxes-of", str(moved)]) == 1
    assert "DATASETS.REGISTER_COCO has ('diagnosed_a', " in capsys.readouterr().err
    without = write_run(tmp_path, "MODEL.MASK_ON", False)
    assert cli.run(diagnose.main, ["--config-file", without, "--boxes-of", other]) == 1
    assert "no masks" in capsys.readouterr().err


@pytest.mark.parametrize("annotations", [None, [], "crowds"])
def test_no_objects(tmp_path, annotations, capsys):
    config = write_run(tmp_path)
    file = tmp_path / "squares/instances.json"
    content = json.loads(file.read_text())
    objects = content.pop("annotations")
    if annotations is not None:
        content["annotations"] = [{**a, "iscrowd": 1} for a in objects if annotations]
    file.write_text(json.dumps(content))
    assert cli.run(diagnose.main, ["--config-file", config]) == 1
    assert f"error: dataset diagnosed_{tmp_path.name} has no objects." in capsys.readouterr().err


def test_data_of_lvis(tmp_path, capsys):
    MetadataCatalog.get("diagnosed_lvis").set(evaluator_type="lvis", json_file="lvis.json")
    DatasetCatalog.register("diagnosed_lvis", [].copy)
    opts = ("DATASETS.TEST", "('diagnosed_lvis',)")
    assert cli.run(diagnose.main, ["--config-file", write_run(tmp_path), *opts]) == 1
    message = "dataset 'diagnosed_lvis' has no annotation file in COCO format"
    assert message in capsys.readouterr().err


def test_output_is_no_input(tmp_path, capsys):
    config = write_run(tmp_path)
    for output in (config, str(tmp_path)):
        assert cli.run(diagnose.main, ["--config-file", config, "--output", output]) == 1
        assert f"{output} is a folder or an input" in capsys.readouterr().err


def test_no_dataset(tmp_path, capsys):
    assert (
        cli.run(diagnose.main, ["--config-file", write_run(tmp_path), "DATASETS.TEST", "()"]) == 1
    )
    assert "DATASETS.TEST is empty" in capsys.readouterr().err


def test_weights_that_are_not_there(tmp_path, capsys):
    config = write_run(tmp_path)
    assert cli.run(diagnose.main, ["--config-file", config, "MODEL.WEIGHTS", "lost.pth"]) == 1
    assert "lost.pth" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(diagnose, "dead_units", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.run(diagnose.main, ["--config-file", write_run(tmp_path)])
