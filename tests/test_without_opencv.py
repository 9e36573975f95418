"""A server may have no OpenCV. Images are read with Pillow."""

import json
import subprocess
import sys

import pytest

from .common import ROOT, child_env, tiny_cfg, write_coco

# Every import of cv2 fails, as if it were not installed.
PROGRAM = """
import runpy, sys
sys.modules["cv2"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_opencv")
    json_file, root = write_coco(folder / "squares", num_images=2)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["squares_without_opencv", json_file, root]]),
        *("DATASETS.TRAIN", ["squares_without_opencv"]),
        *("DATASETS.TEST", ["squares_without_opencv"]),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", []),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        *("OUTPUT_DIR", str(folder / "run")),
    )
    (folder / "config.yaml").write_text(cfg.dump())
    done = run("train_net.py", "--config-file", folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def run(*command):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, command)],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
    )


def demo(folder, *args):
    weights = ("--opts", "MODEL.WEIGHTS", folder / "run/model_final.pth")
    command = ("demo/demo.py", "--config-file", folder / "run/config.yaml", "--input")
    return run(*command, folder / "squares/images", "--confidence-threshold", 0, *args, *weights)


def test_trains_evaluates_and_predicts(folder):
    evaluated = json.loads((folder / "run/inference/coco_instances_results.json").read_text())
    assert {detection["image_id"] for detection in evaluated} == {1, 2}
    done = demo(folder, "--json", folder / "results.json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((folder / "results.json").read_text())) == len(evaluated)


def test_what_needs_it_says_so(folder):
    done = demo(folder, "--output", folder / "pictures")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: OpenCV is not installed")
