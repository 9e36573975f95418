"""The command line, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from panet_d2.engine.main import main

from .common import ROOT, child_env, tiny_cfg, write_coco


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, its data set, and a finished run of 60 steps in `run`."""
    folder = tmp_path_factory.mktemp("train_net")
    json_file, root = write_coco(folder / "squares", num_images=6)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["net_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["net_squares"]),
        *("DATASETS.TEST", ["net_squares"]),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.BASE_LR", 0.01),
        *("SOLVER.MAX_ITER", 60),
        *("SOLVER.STEPS", [50]),
        *("SOLVER.WARMUP_ITERS", 10),
        *("SOLVER.CHECKPOINT_PERIOD", 50),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 5.0),
        *("SEED", 1),
    )
    (folder / "config.yaml").write_text(cfg.dump())
    done = train_net(folder, "OUTPUT_DIR", str(folder / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def train_net(folder, *args):
    config_file = str(folder / "config.yaml")
    return start(sys.executable, "train_net.py", "--config-file", config_file, *args)


@pytest.fixture
def train_net_here(folder, capsys):
    """The same in this process, which saves the imports."""

    def run(*args):
        capsys.readouterr()
        try:
            status = main(["--config-file", str(folder / "config.yaml"), *args])
        except SystemExit as e:
            status = e.code
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())

    return run


def start(*command):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def last_results(run):
    """The last evaluation in a run's metrics.json, without losses and times."""
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    evaluated = [line for line in lines if "segm/AP" in line][-1]
    return {k: v for k, v in evaluated.items() if k.startswith(("bbox/", "segm/"))}


def printed(done, task):
    """The numbers that Detectron2 prints for pasting, as one list."""
    lines = [line.split("copypaste: ")[-1] for line in done.stdout.splitlines()]
    return [float(v) for v in lines[lines.index(f"Task: {task}") + 2].split(",")]


def test_trains_and_says_where(folder):
    run = folder / "run"
    assert (run / "model_final.pth").is_file() and (run / "config.yaml").is_file()
    assert last_results(run)["bbox/AP50"] > 1  # it has learned to find squares


def test_warnings_of_the_setup_are_in_the_log(folder, tmp_path):
    """It comes before the log file, which says what OUTPUT_DIR is."""
    opts = ("MODEL.DEVICE", "", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    done = train_net(folder, *opts, "OUTPUT_DIR", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    text = "No CUDA device found" if not torch.cuda.is_available() else "Checking"
    assert (tmp_path / "run/log.txt").read_text().count(text) == 1
    assert (done.stdout + done.stderr).count(text) == 1


def test_eval_only_gives_the_same_numbers(folder, train_net_here):
    run = folder / "run"
    weights = str(run / "model_final.pth")
    done = train_net_here(
        "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder / "eval")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained = last_results(run)
    for task in ("bbox", "segm"):
        expected = [trained[f"{task}/{k}"] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        assert printed(done, task) == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_eval_only_of_the_run_itself(folder, train_net_here):
    done = train_net_here("--eval-only", "--resume", "OUTPUT_DIR", str(folder / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert printed(done, "segm")[0] == pytest.approx(
        last_results(folder / "run")["segm/AP"], abs=1e-4
    )


def test_eval_only_fails_below_the_expected_results(folder, train_net_here):
    args = ("--eval-only", "--resume", "OUTPUT_DIR", str(folder / "run"), "TEST.EXPECTED_RESULTS")
    mask_ap = last_results(folder / "run")["segm/AP"]
    assert train_net_here(*args, f"[['segm', 'AP', {mask_ap}, 0.1]]").returncode == 0
    assert train_net_here(*args, f"[['segm', 'AP', {mask_ap + 1}, 0.1]]").returncode == 1


def test_test_time_augmentation(folder, train_net_here):
    done = train_net_here(
        "--eval-only",
        *("MODEL.WEIGHTS", str(folder / "run/model_final.pth")),
        *("OUTPUT_DIR", str(folder / "tta")),
        *("TEST.AUG.ENABLED", "True"),
        *("TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.AUG.ROTATIONS", "(90,)"),
        *("TEST.SOFT_NMS.ENABLED", "True", "TEST.BOX_VOTING.ENABLED", "True"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 views of an image, 16 forward passes" in done.stdout
    assert (folder / "tta/inference_TTA/coco_instances_results.json").is_file()


def test_resumes_where_it_stopped(folder, train_net_here):
    run, half = folder / "run", folder / "half"
    half.mkdir()
    (half / "model_0000049.pth").write_bytes((run / "model_0000049.pth").read_bytes())
    (half / "last_checkpoint").write_text("model_0000049.pth")
    done = train_net_here("--resume", "OUTPUT_DIR", str(half))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Starting training from iteration 50" in done.stdout
    resumed, whole = (torch.load(d / "model_final.pth") for d in (half, run))
    assert resumed["iteration"] == whole["iteration"] == 59
    assert resumed["model"].keys() == whole["model"].keys()


MISTAKES = [
    (["OUTPUT_DIR", "{run}"], "holds another run.*--resume"),
    (["OUTPUT_DIR", "{run}/metrics.json"], "OUTPUT_DIR is .*metrics.json"),
    (["OUTPUT_DIR", "{run}/metrics.json/new"], "OUTPUT_DIR is .*metrics.json/new"),
    (["INPUT.FORMAT", "L", "OUTPUT_DIR", "{new}"], "INPUT.FORMAT is 'L', which has 1 channel"),
    (["--eval-only", "OUTPUT_DIR", "{new}"], "MODEL.WEIGHTS is empty"),
    (["--eval-only", "DATASETS.TEST", "()", "OUTPUT_DIR", "{new}"], "DATASETS.TEST is empty"),
    (
        [
            *("DATASETS.TRAIN", "('coco_2017_train',)", "OUTPUT_DIR", "{new}"),
            *("DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "80"),
        ],
        "'coco_2017_train': .*instances_train2017.json does not exist",
    ),
    (
        ["--eval-only", "MODEL.WEIGHTS", "{run}/metrics.json", "OUTPUT_DIR", "{new}"],
        "metrics.json is not a checkpoint",
    ),
    (
        [
            *("--eval-only", "MODEL.WEIGHTS", "{run}/model_final.pth", "OUTPUT_DIR", "{new}"),
            *("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", "False"),
        ],
        "not in the model: roi_heads.mask_head.fc_fusion",
    ),
    (["MODEL.ROI_HEADS.NUM_CLASSES", "5", "OUTPUT_DIR", "{new}"], "is 5.*has 3 classes"),
    (["MODEL.ROI_BOX_HEAD.AFP.FUSION", "or", "OUTPUT_DIR", "{new}"], "AFP.FUSION is 'or'"),
    (
        [
            *("TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"),
            *("MODEL.RETINANET.NUM_CLASSES", "3", "OUTPUT_DIR", "{new}"),
        ],
        "TEST.AUG.ENABLED .*RetinaNet",
    ),
]

# One process for all, because most of the time of a process is that of its imports.
SEVERAL = """
import io, json, sys
from contextlib import redirect_stderr
from panet_d2.engine.main import main

for args in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as stderr:
        status = main(args)
    print("ended", json.dumps([status, stderr.getvalue()]))
"""


@pytest.fixture(scope="module")
def ends(folder):
    """Status and stderr of train_net.py for each of the mistakes."""
    places = {"run": folder / "run", "new": folder / "new"}
    config = ["--config-file", str(folder / "config.yaml")]
    commands = [[*config, *(a.format(**places) for a in args)] for args, _ in MISTAKES]
    done = start(sys.executable, "-c", SEVERAL, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ended ")]
    return [json.loads(line[len("ended ") :]) for line in lines]


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=[message for _, message in MISTAKES])
def test_mistakes_are_one_sentence(ends, index):
    status, stderr = ends[index]
    assert status == 1
    error = stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(MISTAKES[index][1], error), error
    assert "Traceback" not in stderr


def test_nothing_of_another_run_is_lost(folder, train_net_here):
    before = {p: p.stat().st_mtime for p in (folder / "run").rglob("*")}
    train_net_here("OUTPUT_DIR", str(folder / "run"))
    assert {p: p.stat().st_mtime for p in (folder / "run").rglob("*")} == before


def test_broken_image_is_named(folder, train_net_here, tmp_path):
    json_file, root = write_coco(tmp_path / "squares", num_images=2)
    (Path(root) / "002.png").write_bytes(b"no image")
    done = train_net_here(
        *("DATASETS.REGISTER_COCO", str([["broken_squares", json_file, root]])),
        *("DATASETS.TRAIN", "('broken_squares',)", "DATASETS.TEST", "()"),
        *("OUTPUT_DIR", str(tmp_path / "run")),
    )
    assert done.returncode == 1
    assert "002.png" in done.stderr.strip().splitlines()[-1]
