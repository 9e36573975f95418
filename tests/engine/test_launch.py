"""Several processes, on the CPU with gloo. What they run is in `workers.py`."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import pytest
import torch
from detectron2.engine import default_argument_parser

from panet_d2.engine import launch
from panet_d2.errors import ConfigError

from ..common import ROOT, child_env, tiny_cfg, write_coco

WORKERS = "tests.engine.workers"
SLOW = pytest.mark.slow


def start(*command):
    log = tempfile.TemporaryFile("w+")  # a pipe would be full before anyone reads it
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=ROOT,
        env=child_env(CUDA_VISIBLE_DEVICES=""),  # models are on the CPU
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    process.log = log
    return process


def finish(process, code=0, timeout=500):
    """Its output, after it has ended with this exit status."""
    try:
        process.wait(timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it leaves behind
    output = output_of(process)
    assert process.returncode == code, output[-5000:]
    return output


def output_of(process):
    process.log.seek(0)
    return process.log.read()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port")


def worker(path, *args):
    return ("-m", WORKERS, "gradients", path, *args)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What workers.py writes of one process."""
    path = tmp_path_factory.mktemp("gradients") / "one.pt"
    finish(start(*worker(path)))
    return torch.load(path)


def commands(started, path):
    """Those that start two processes of workers.py in this way."""
    if started == "torchrun":
        return [(*TORCHRUN, free_port(), *worker(path))]
    if started == "spawned":
        return [worker(path, "--num-gpus", 2, "--dist-url", "auto")]
    machines = ("--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}")
    return [worker(path, *machines, "--machine-rank", rank) for rank in (0, 1)]


@pytest.mark.parametrize("started", ["spawned", "torchrun", pytest.param("machines", marks=SLOW)])
def test_two_processes_have_the_gradients_of_one(started, one, tmp_path):
    path = tmp_path / "two.pt"
    for job in [start(*command) for command in commands(started, path)]:
        finish(job)
    two = torch.load(path)
    assert two["processes"] == 2 and one["processes"] == 1
    assert one["losses"].keys() == two["losses"].keys()
    for name, loss in one["losses"].items():
        assert two["losses"][name] == pytest.approx(loss, rel=1e-5), name
    assert one["gradients"].keys() == two["gradients"].keys()
    assert any("pafpn_downsample3.norm" in name for name in one["gradients"])  # naiveSyncBN
    for name, gradient in one["gradients"].items():
        # A bias before a norm has no gradient but rounding.
        error = (two["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-2)
        assert error < 1e-4, (name, float(error))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    json_file, root = write_coco(folder, num_images=5)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["launch_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["launch_squares"]),
        *("DATASETS.TEST", ["launch_squares"]),
        *("DATALOADER.NUM_WORKERS", 1),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.BASE_LR", 0.01),
        *("SOLVER.MAX_ITER", 40),
        *("SOLVER.CHECKPOINT_PERIOD", 1000),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        *("SEED", 1),
    )
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml"


TRAIN = ("train_net.py", "--config-file")


def detections(folder):
    """What was found: image, class, score and box, without the order of the images."""
    found = json.loads((folder / "inference/coco_instances_results.json").read_text())
    return sorted(
        (d["image_id"], d["category_id"], round(d["score"], 5), *(round(v, 2) for v in d["bbox"]))
        for d in found
    )


def test_two_processes_train_and_evaluate_as_one(config_file, tmp_path):
    """Trained by two; evaluated by two, at the end of training, and by one."""
    two, one = tmp_path / "two", tmp_path / "one"
    opts = ("SOLVER.MAX_ITER", 8, "OUTPUT_DIR", two)
    finish(start(*TRAIN, config_file, "--num-gpus", 2, *opts))
    weights = ("MODEL.WEIGHTS", two / "model_final.pth")
    finish(start(*TRAIN, config_file, "--eval-only", *weights, "OUTPUT_DIR", one))
    assert detections(one) == detections(two)
    assert {image for image, *_ in detections(two)} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    "processes, workers",
    [(1, 0), *(pytest.param(*case, marks=SLOW) for case in ((2, 0), (1, 2), (2, 1)))],
)
def test_sigterm_saves_and_stops(config_file, tmp_path, processes, workers):
    """And the run goes on from there, to the weights of one that was not stopped."""
    opts = ("DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", workers)
    command = (*TRAIN, config_file, "--num-gpus", processes)
    whole = tmp_path / "whole"
    finish(start(*command, *opts, "OUTPUT_DIR", whole))
    stopped = start(*command, *opts, "OUTPUT_DIR", tmp_path / "stopped")
    wait_for_steps(tmp_path / "stopped", stopped)
    if workers:
        os.killpg(stopped.pid, signal.SIGTERM)  # to all there are, as some schedulers do
    else:
        stopped.send_signal(signal.SIGTERM)  # to the first process alone, as others do
    assert "Stopped by SIGTERM after" in finish(stopped, 128 + signal.SIGTERM, 60)
    (saved,) = (tmp_path / "stopped").glob("*.pth")
    assert 20 <= int(saved.stem[len("model_") :]) < 39
    finish(start(*command, "--resume", *opts, "OUTPUT_DIR", tmp_path / "stopped"))
    ours, theirs = (
        torch.load(folder / "model_final.pth")["model"] for folder in (tmp_path / "stopped", whole)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_mistakes_are_one_sentence_in_several_processes():
    output = finish(start(*TRAIN, "lost.yaml", "--num-gpus", 2), 1)
    assert "error: lost.yaml" in output and "Traceback" not in output


def wait_for_steps(folder, process, timeout=300):
    """Until the run has written its first metrics, after 20 steps."""
    path, until = folder / "metrics.json", time.time() + timeout
    while not (path.is_file() and path.read_text()):
        assert process.poll() is None and time.time() < until, output_of(process)[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--num-gpus", "0"], "--num-gpus is 0"),
        (["--num-machines", "0"], "--num-machines is 0"),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank is 2.*from 0 to 1"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url is missing"),
        (["--num-gpus", "2", "--dist-url", "localhost:1"], "'localhost:1'.*tcp://HOST:PORT"),
        (["--num-gpus", "2", "--dist-url", "tcp://localhost"], "tcp://HOST:PORT"),
        (["--num-gpus", "2", "--dist-url", "tcp://localhost:99999"], "tcp://HOST:PORT"),
    ],
)
def test_arguments_that_cannot_work_are_named(args, message):
    with pytest.raises(ConfigError, match=message):
        launch(None, default_argument_parser().parse_args(args))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--num-gpus is 2.*has 1 GPU"):
        launch(None, default_argument_parser().parse_args(["--num-gpus", "2"]))


def test_port_of_another_job():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--dist-url is '{url}'.*another port"):
            launch(None, default_argument_parser().parse_args(["--num-gpus=2", "--dist-url", url]))


def test_one_process_is_this_one():
    seen = []
    launch(seen.append, default_argument_parser().parse_args(["--num-gpus", "1"]))
    assert len(seen) == 1
