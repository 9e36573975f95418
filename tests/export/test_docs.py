"""The programs in docs/export.md, run as they stand there."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from panet_d2.engine import Predictor
from panet_d2.export import FORMATS, export_model, sample_images

from ..common import ROOT, tiny_cfg
from ..docs.common import code_blocks
from .test_export import THRESHOLD, confident

OBJECTS, TORCHSCRIPT, ONNX = code_blocks(ROOT / "docs/export.md", "python")[:3]


@pytest.mark.parametrize("format, program", zip(FORMATS, (TORCHSCRIPT, ONNX)), ids=FORMATS)
def test_finds_what_the_predictor_finds(format, program, tmp_path, monkeypatch, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    cfg = tiny_cfg(*THRESHOLD, "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "objects", raising=False)
    (tmp_path / "exported").mkdir()
    sizes = "short_side=96, long_side=128"
    (tmp_path / "objects.py").write_text(OBJECTS.replace("short_side=800, long_side=1333", sizes))
    # A PNG by its content, so that what is read is what was written.
    pixels = np.random.randint(0, 256, (60, 90, 3), np.uint8)
    (tmp_path / "image.jpg").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())

    model = confident(build_model(cfg))
    torch.save({"model": model.state_dict()}, "model.pth")
    cfg.MODEL.WEIGHTS = "model.pth"
    expected = Predictor(cfg)(pixels)["instances"]
    images = sample_images(cfg, ["image.jpg"])
    file = {"torchscript": "exported/model.ts", "onnx": "exported/model.onnx"}[format]
    export_model(model, images, file, format)

    names: dict = {}
    exec(program, names)
    printed = capsys.readouterr().out.splitlines()
    found = list(names["objects"](names["size"], names["image"], *names["outputs"]))
    assert len(printed) == len(found) == len(expected) > 10
    labels, scores, boxes, masks = (np.stack(values) for values in zip(*found))
    assert labels.tolist() == expected.pred_classes.tolist()
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-2)
    # OpenCV interpolates in steps of a 32nd of a pixel.
    assert masks.shape == expected.pred_masks.shape
    assert (masks != expected.pred_masks.numpy()).mean() < 1e-3 < masks.mean()
