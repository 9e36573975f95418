import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from panet_d2 import cli

from ..common import load_script, tiny_cfg, write_coco

tool = load_script("tools/export_model.py")


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with a config and the weights of a model that finds something."""
    json_file, root = write_coco(tmp_path / "squares")
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["exported_squares", json_file, root]]),
        *("DATASETS.TEST", ["exported_squares"]),
        *("MODEL.WEIGHTS", str(tmp_path / "model.pth")),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.26),
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(30)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    return tmp_path


def export(run: Path, *args: str) -> int:
    return cli.run(
        tool.main, ["--config-file", str(run / "config.yaml"), "--output", str(run / "out"), *args]
    )


def written(run: Path) -> list:
    return sorted(p.name for p in (run / "out").iterdir()) if (run / "out").exists() else []


def test_both_formats(run, capsys):
    pytest.importorskip("onnxruntime")
    assert export(run) == 0
    assert written(run) == ["model.onnx", "model.ts"]
    printed = capsys.readouterr().out
    assert printed.count("4 images, 1 of them without detections") == 2
    assert str(run / "out/model.onnx") in printed


def test_weights_of_a_run_are_its_last(run, capsys):
    """Not those that its training started from."""
    (run / "model.pth").rename(run / "model_final.pth")
    assert export(run, "--format", "torchscript") == 0
    assert f"weights: {run / 'model_final.pth'}" in capsys.readouterr().out


def test_one_channel(run, capsys):
    """Its images are gray, those of the check as well."""
    opts = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD", [60.0]]
    model = build_model(tiny_cfg(*opts))
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(30)
    torch.save({"model": model.state_dict()}, run / "model.pth")
    assert export(run, "--format", "torchscript", "--opts", *map(str, opts)) == 0
    assert written(run) == ["model.ts"]


def test_unusable_weights(run, capsys):
    (run / "model.pth").write_text("<!DOCTYPE html>")
    assert export(run, "--format", "torchscript") == 1
    assert "model.pth is not a checkpoint: it is a web page" in capsys.readouterr().err


def test_given_images(run, capsys):
    """Then no data set is needed."""
    image = next((run / "squares/images").iterdir())
    (run / "squares/instances.json").write_text(json.dumps({}))
    assert export(run, "--format", "torchscript", "--images", str(image)) == 0
    assert written(run) == ["model.ts"]


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "MODEL.META_ARCHITECTURE is 'PanopticFPN'"),
        (["MODEL.WEIGHTS", "lost.pth"], "lost.pth"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"], "finds nothing"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    ],
)
def test_one_clear_error(run, opts, message, capsys):
    assert export(run, "--format", "torchscript", "--opts", *opts) == 1
    error = capsys.readouterr().err
    assert message in error and "error: " in error
    assert written(run) == []


def test_no_file_of_an_export_that_differs(run, capsys, monkeypatch):
    pooling = sys.modules["panet_d2.layers.multilevel_roi_align"]
    name = "multilevel_roi_align_reference"
    reference = getattr(pooling, name)
    monkeypatch.setattr(pooling, name, lambda *args: reference(*args) * 1.1)
    assert export(run, "--format", "torchscript") == 1
    assert "export to torchscript differ" in capsys.readouterr().err
    assert written(run) == []
