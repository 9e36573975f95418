"""The examples in docs/programs.md, run as printed there, each in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances

from ..common import ROOT, child_env, tiny_cfg
from ..export.test_export import confident

PROGRAMS = dict(
    re.findall(
        r"^### (\S+)$.*?```python\n(.*?)```",
        (ROOT / "docs/programs.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
)
NAMES = ["text", "title", "figure"]  # the example of layoutparser has the same


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run whose dataset is not at hand, and an image."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    cfg = tiny_cfg(
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5),
        *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128),
        *("DATASETS.TRAIN", ["gone_train"], "DATASETS.TEST", ["gone_val"]),
        *("DATASETS.CATEGORIES", [[i, name] for i, name in enumerate(NAMES, 7)]),
    )
    (folder / "output/cells").mkdir(parents=True)
    (folder / "output/cells/config.yaml").write_text(cfg.dump())
    model = confident(build_model(cfg))
    model.roi_heads.box_predictor.cls_score.weight.data.mul_(3)
    torch.save({"model": model.state_dict()}, folder / "output/cells/model_final.pth")
    # A PNG by its content, so that every program reads the same pixels.
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    (folder / "image.jpg").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    # Some programs look for a distribution of this name. A wheel of Detectron2 may have another.
    try:
        importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        (folder / "detectron2-0.6.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n"
        (folder / "detectron2-0.6.dist-info/METADATA").write_text(metadata)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> Instances:
    cfg = tiny_cfg()
    cfg.merge_from_file(str(folder / "output/cells/config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "output/cells/model_final.pth")
    objects = DefaultPredictor(cfg)(cv2.imread(str(folder / "image.jpg")))["instances"]
    assert len(objects) > 3 and len(set(objects.pred_classes.tolist())) > 1
    return objects


def run(name: str, folder: Path, results: str, variable: str = "", package: str = "") -> list:
    """Run an example; return the values of ``results``, expressions after it."""
    package = package or name
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make test-downstream)")
    program = f"{PROGRAMS[name]}\nimport json\nprint('\\n' + json.dumps([{results}]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=folder,
        env=child_env(ROOT, folder, DETECTRON2_ENV_MODULE=variable),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(expected: Instances, names: list, scores: list, boxes: list, masks: list) -> None:
    assert names == [NAMES[i] for i in expected.pred_classes]
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-3)
    assert (np.array(masks) == expected.pred_masks.numpy()).all()


def test_sahi(folder, expected):
    """Boxes and masks before SAHI makes polygons of them."""
    found = 'model.original_predictions["instances"]'
    results = "[o.category.name for o in objects], [o.score.value for o in objects], "
    results += f"{found}.pred_boxes.tensor.tolist(), {found}.pred_masks.tolist()"
    check(expected, *run("SAHI", folder, results, "panet_d2.env", package="sahi"))


def test_layoutparser(folder, expected):
    results = ", ".join(
        f"[o.{field} for o in objects]" for field in ("type", "score", "coordinates")
    )
    found = run("layoutparser", folder, results, "panet_d2.env")
    check(expected, *found, expected.pred_masks.tolist())


def test_supervision(folder, expected):
    fields = (f"objects.{field}.tolist()" for field in ("confidence", "xyxy", "mask"))
    check(expected, *run("supervision", folder, ", ".join(["names", *fields])))
    assert cv2.imread(str(folder / "picture.jpg")).shape == (60, 90, 3)


def test_grad_cam(folder, expected):
    results = "cam.outputs[0].tolist(), maps.tolist()"
    scores, maps = run("grad-cam", folder, results, package="pytorch_grad_cam")
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    assert np.shape(maps) == (1, 85, 128) and np.max(maps) > 0.5
