"""Whole runs on real images, where the data sets are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from panet_d2.engine import setup_config

from .common import ROOT, child_env

DATASETS = Path(os.environ.get("DETECTRON2_DATASETS") or ROOT.parent / "shared" / "datasets")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (DATASETS / name).is_dir(),
        reason=f"data set {name} is not at {DATASETS} (set DETECTRON2_DATASETS)",
    )


def few(folder: Path, name: str, count: int = 12) -> Path:
    """Make a folder of data sets that has the first images of each part of a data set."""
    (folder / name / "annotations").mkdir(parents=True)
    for path in (DATASETS / name / "annotations").glob("instances_*.json"):
        content = json.loads(path.read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (folder / name / "annotations" / path.name).write_text(json.dumps(content))
        split = path.stem[len("instances_") :]
        (folder / name / split).symlink_to(DATASETS / name / split)
    return folder


def train_net(datasets: Path, *args: str) -> list:
    """Run it on the CPU and return the results of its evaluation."""
    output = args[args.index("OUTPUT_DIR") + 1]
    done = subprocess.run(
        [sys.executable, "train_net.py", *args, "MODEL.DEVICE", "cpu"],
        cwd=ROOT,
        env=child_env(DETECTRON2_DATASETS=str(datasets)),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = Path(output) / "inference/coco_instances_results.json"
    return json.loads(results.read_text())


@needs("coco")
def test_evaluates_a_coco_config(tmp_path):
    """Validation images at a tenth of their size, with an untrained model."""
    config = str(ROOT / "configs/COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml")
    torch.manual_seed(0)
    model = build_model(setup_config(config, ["MODEL.DEVICE", "cpu"], needed=()))
    # Untrained, a frozen ResNet doubles the variance in every block.
    for name, buffer in model.named_buffers():
        if name.endswith("norm.weight"):
            buffer.fill_(0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    datasets = few(tmp_path / "datasets", "coco")
    results = train_net(
        datasets,
        *("--config-file", config, "--eval-only"),
        *("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "OUTPUT_DIR", str(tmp_path)),
        *("INPUT.MIN_SIZE_TEST", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
    )
    val = json.loads((datasets / "coco/annotations/instances_val2017.json").read_text())
    assert {r["image_id"] for r in results} == {i["id"] for i in val["images"]}
    assert {r["category_id"] for r in results} <= {c["id"] for c in val["categories"]}
    sizes = {i["id"]: [i["height"], i["width"]] for i in val["images"]}
    assert all(r["segmentation"]["size"] == sizes[r["image_id"]] for r in results)


@needs("dsb2018")
def test_trains_on_nuclei(tmp_path):
    train_net(
        few(tmp_path / "datasets", "dsb2018"),
        *("--config-file", "configs/DSB2018/panet_R_18_FPN_gn.yaml"),
        *("OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
        *("SOLVER.IMS_PER_BATCH", "2", "TEST.DETECTIONS_PER_IMAGE", "10"),
        *("INPUT.MIN_SIZE_TEST", "64"),
    )
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("segm/AP" in line for line in metrics)
    assert (tmp_path / "model_final.pth").is_file()
