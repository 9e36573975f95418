"""Runs that are killed at any moment. Minutes each, so only with -m slow."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from panet_d2.engine import latest_checkpoint

from .common import ROOT, child_env, tiny_cfg, write_coco

KILLS = 20
STEPS = 60


@pytest.fixture
def command(tmp_path):
    json_file, root = write_coco(tmp_path, num_images=6)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["fault_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["fault_squares"]),
        *("INPUT.MIN_SIZE_TRAIN", [48, 64]),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.BASE_LR", 0.01),
        *("SOLVER.MAX_ITER", STEPS),
        *("SOLVER.STEPS", [STEPS // 2]),
        *("SOLVER.WARMUP_ITERS", 10),
        *("SOLVER.CHECKPOINT_PERIOD", 2),  # so that many of the kills meet one that is written
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SEED", 1),
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = [sys.executable, "-W", "ignore", "train_net.py", "--resume", "--config-file"]
    return [*command, str(tmp_path / "config.yaml"), "OUTPUT_DIR"]


def start(command, output, log):
    command = [*command, str(output)]
    return subprocess.Popen(command, cwd=ROOT, env=child_env(), stdout=log, stderr=log)


def weights(output):
    return torch.load(output / "model_final.pth")


@pytest.mark.slow
def test_killed_at_random_moments(command, tmp_path):
    """
    SIGKILL at moments from before the first step to the middle of a save. However often, the run
    ends in the weights of one that was left alone, and every checkpoint on the way can be loaded.
    """
    with open(tmp_path / "log", "w") as log:
        began = time.time()
        assert start(command, tmp_path / "whole", log).wait() == 0
        whole_seconds = time.time() - began
        rng = random.Random(0)
        killed, progress = 0, []
        while killed < KILLS:
            process = start(command, tmp_path / "killed", log)
            # Up to when a run would be done; at least until the next steps are likely under way.
            reached = progress[-1] if progress else 0
            limit = whole_seconds * rng.uniform(0.1, 0.6 + 0.4 * (1 - reached / STEPS))
            try:
                assert process.wait(limit) == 0  # done before its time: from the start again
                compare(tmp_path / "killed", tmp_path / "whole")
                shutil.rmtree(tmp_path / "killed")
                progress.append(0)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                progress.append(check_checkpoints(tmp_path / "killed"))
        assert start(command, tmp_path / "killed", log).wait() == 0
    compare(tmp_path / "killed", tmp_path / "whole")
    print(f"{KILLS} kills after steps {progress}")
    assert len(set(progress)) > 3  # they did hit different moments


def check_checkpoints(output):
    """Load all of them; returns the steps that the last one has."""
    for path in output.glob("*.pth"):
        assert torch.load(path)["model"], path
    last = latest_checkpoint(str(output)) if output.is_dir() else None
    return torch.load(last)["iteration"] + 1 if last else 0


def compare(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    ours, theirs = (c["trainer"]["_trainer"]["optimizer"]["state"] for c in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert torch.equal(ours[key]["momentum_buffer"], state["momentum_buffer"]), key
