"""A server may have no OpenCV. Images are read with Pillow."""

import json
import subprocess
import sys

import pytest

from .common import ROOT, child_env, tiny_cfg, write_coco

# Every import of cv2 fails, as if it were not installed.
PROGRAM = """
import json, runpy, sys
sys.modules["cv2"] = None
for command in json.loads(sys.argv[1]):
    sys.argv[:] = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as e:
        print(command[0], "ended with", e.code, file=sys.stderr)
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
    return folder


@pytest.fixture(scope="module")
def errors(folder):
    """What a training, a prediction and another one with pictures print on stderr."""
    demo = ("demo/demo.py", "--config-file", folder / "run/config.yaml", "--input")
    demo += (folder / "squares/images", "--confidence-threshold", 0)
    weights = ("--opts", "MODEL.WEIGHTS", folder / "run/model_final.pth")
    commands = [
        ("train_net.py", "--config-file", folder / "config.yaml"),
        (*demo, "--json", folder / "results.json", *weights),
        (*demo, "--output", folder / "pictures", *weights),
    ]
    commands = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, commands],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_trains_evaluates_and_predicts(folder, errors):
    assert [line for line in errors if "ended with" in line][:2] == [
        "train_net.py ended with 0",
        "demo/demo.py ended with 0",
    ]
    evaluated = json.loads((folder / "run/inference/coco_instances_results.json").read_text())
    assert {detection["image_id"] for detection in evaluated} == {1, 2}
    assert len(json.loads((folder / "results.json").read_text())) == len(evaluated)


def test_what_needs_it_says_so(errors):
    assert errors[-1] == "demo/demo.py ended with 1"
    assert errors[-2].startswith("error: OpenCV is not installed")
    assert not any("Traceback" in line for line in errors)
