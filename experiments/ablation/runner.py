"""Runs of the ablation. Each is an ordinary training run and leaves one JSON file."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import isnan
from os import cpu_count
from statistics import median
from typing import IO, Callable, Dict, List, Optional, Sequence, Set

import torch
from tqdm import tqdm

from panet_d2.analysis import evaluations, losses, read_history
from panet_d2.checkpoint import atomic_open, write_json
from panet_d2.checkpoint.safe_load import load_untrusted
from panet_d2.errors import PanetError

__all__ = [
    "SPEED_KEYS",
    "Run",
    "RunFailed",
    "differing_key",
    "execute",
    "pretrained_resnet",
    "result_of",
    "run_all",
]


_AP = [f"{task}/AP{kind}" for task in ("bbox", "segm") for kind in ("", "50", "75", "s", "m", "l")]

# Config keys that results depend on by rounding only.
SPEED_KEYS = ("MODEL.PAFPN.MEMORY_FORMAT",)

# The training runs that this process has started and that have not ended yet.
_trainings: Set[subprocess.Popen] = set()


class RunFailed(PanetError, RuntimeError):
    """A training run ended with an error. The message names its log."""


@dataclass(frozen=True)
class Run:
    """
    One model, trained once.

    Args:
        rung (str): name of the rung.
        seed (int): seed of the weights, of the order of the data and of its augmentation.
        config_file (str): config of the baseline.
        opts (tuple): the rung's overrides.
    """

    rung: str
    seed: int
    config_file: str
    opts: tuple

    @property
    def name(self) -> str:
        return f"{self.rung}_seed{self.seed}"

    @property
    def settings(self) -> Dict[str, str]:
        """
        Config and overrides as text, for the JSON file. ``MODEL.WEIGHTS`` is a file name without
        its folder, which differs between machines.
        """
        opts = {str(key): str(value) for key, value in zip(self.opts[::2], self.opts[1::2])}
        if "MODEL.WEIGHTS" in opts:
            opts["MODEL.WEIGHTS"] = os.path.basename(opts["MODEL.WEIGHTS"])
        return {"config": os.path.basename(self.config_file), **opts}


def result_file(results: str, run: Run) -> str:
    """Path of a run's JSON file in the folder ``results``."""
    return os.path.join(results, f"{run.name}.json")


def differing_key(settings: Dict[str, str], others: Dict[str, str]) -> Optional[str]:
    """
    First key in which two runs' settings differ or that only one has; None if they agree. Keys
    that only change the speed do not count.
    """
    keys = (key for key in {**settings, **others} if key not in SPEED_KEYS)
    return next((key for key in keys if settings.get(key) != others.get(key)), None)


def _check_settings(run: Run, path: str) -> None:
    """Raise RunFailed if the JSON file ``path`` is of a run with other settings."""
    with open(path, encoding="utf-8") as f:
        found = json.load(f).get("settings", {})
    key = differing_key(run.settings, found)
    if key:
        raise RunFailed(
            f"{path} is of a run with other settings ({key} {found.get(key)}, now "
            f"{run.settings.get(key)}): delete it or set another folder."
        )


def _claim(run: Run, output: str) -> IO:
    """
    Lock a run for this process and for those that inherit the returned file, because two processes
    must not write one folder.
    """
    lock = open(os.path.join(output, "run.lock"), "a")
    # Not filelock: on Python 3.9 it has no public access to the file, which training must inherit.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFailed(f"{run.name} is under way in another process, in {output}.") from None
    return lock


def _train(command: Sequence[str], log: str, environment: Dict[str, str], lock: IO) -> int:
    """Run the command and return its exit status."""
    with open(log, "a", encoding="utf-8") as f:
        # Training inherits the lock, which holds until training ends even if this process dies.
        training = subprocess.Popen(
            command, stdout=f, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()]
        )
    with training:
        _trainings.add(training)
        try:
            return training.wait()
        except BaseException:
            training.terminate()
            raise
        finally:
            _trainings.discard(training)


def execute(
    run: Run, work: str, results: str, train_net: str, threads: Optional[int] = None
) -> None:
    """
    Train and evaluate a model and write the JSON file. A run that was cut off is resumed.

    Args:
        run (Run): the run.
        work (str): folder for the output folders of training runs.
        results (str): folder for JSON files.
        train_net (str): path of ``train_net.py``.
        threads (int): number of CPU threads; None for torch's default.

    Raises:
        RunFailed: if training ends with an error, was begun with other settings, or is under way in
            another process.
    """
    output = os.path.join(work, run.name)
    os.makedirs(output, exist_ok=True)
    with _claim(run, output) as lock:
        begun = os.path.join(output, "run.json")
        if os.path.isfile(begun):
            _check_settings(run, begun)
        else:
            write_json(begun, {"settings": run.settings})
        opts = [*run.opts, "SEED", run.seed, "OUTPUT_DIR", output]
        command = [sys.executable, "-W", "ignore", train_net, "--config-file", run.config_file]
        command += ["--resume", *map(str, opts)]
        log = os.path.join(output, "console.txt")
        environment = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        started = time.time()
        status = _train(command, log, environment, lock)
        if status:
            raise RunFailed(f"{run.name} ended with {status}; see {log}.")
        content = result_of(run, output)
        content["wall_seconds"] = time.time() - started
        write_json(result_file(results, run), content)


def result_of(run: Run, output: str) -> Dict:
    """
    Args:
        run (Run): a finished run.
        output (str): its output folder.

    Returns:
        dict: the content of its JSON file.
    """
    history = read_history(os.path.join(output, "metrics.json"))
    for line in history:
        # If a model detects nothing, Detectron2 reports nan for boxes and no key for masks.
        if isnan(line.get("bbox/AP", 0.0)):
            line.update({key: 0.0 for key in _AP})
    evaluated, trained = evaluations(history), losses(history)
    last = evaluated[max(evaluated)]
    with open(os.path.join(output, "log.txt"), encoding="utf-8") as f:
        log = f.read()
    compute = re.findall(r"inference pure compute time: \S+ \(([\d.]+) s / iter", log)
    return {
        "rung": run.rung,
        "seed": run.seed,
        "settings": run.settings,
        "steps": max(evaluated),
        "results": {k: v for k, v in last.items() if k.startswith(("bbox/AP", "segm/AP"))},
        "curve": {step: line["segm/AP"] for step, line in evaluated.items()},
        "losses": {step: line["total_loss"] for step, line in trained.items()},
        "seconds_per_step": median(line["time"] for line in trained.values() if "time" in line),
        "seconds_per_image": float(compute[-1]),
    }


def pretrained_resnet(run: Run, work: str, results: str, train_net: str) -> str:
    """
    Train a model for its ResNet, unless that was done before. The paper's models start from a
    ResNet trained on ImageNet. No such ResNet is as small as those of the ablation.

    Args:
        run, work, results, train_net: see :func:`execute`.

    Returns:
        str: path of a checkpoint with only the ResNet.

    Raises:
        RunFailed: if training ends with an error.
        CheckpointError: if its checkpoint cannot be read.
    """
    path = os.path.join(work, f"{run.name}_resnet.pth")
    if not os.path.isfile(path):
        execute(run, work, results, train_net)
        trained = load_untrusted(os.path.join(work, run.name, "model_final.pth"))["model"]
        resnet = {k: v for k, v in trained.items() if k.startswith("backbone.bottom_up.")}
        with atomic_open(path, "wb") as f:
            torch.save({"model": resnet}, f)
    return path


def run_all(
    runs: Sequence[Run],
    work: str,
    results: str,
    train_net: str,
    jobs: int = 1,
    execute: Callable = execute,
) -> List[str]:
    """
    Execute all runs that have no JSON file yet, with a progress bar.

    Args:
        runs, work, results, train_net: see :func:`execute`.
        jobs (int): number of runs at a time. They share the cores, because two runs with all
            threads each slow each other down tenfold.
        execute (callable): executes one run.

    Returns:
        list[str]: one message for each run that failed.

    Raises:
        RunFailed: before anything is trained, if a JSON file is of a run with other settings.
    """
    os.makedirs(results, exist_ok=True)
    todo = []
    for run in runs:
        path = result_file(results, run)
        if os.path.isfile(path):
            _check_settings(run, path)
        else:
            todo.append(run)
    failures: List[str] = []
    threads = max(1, cpu_count() // jobs) if jobs > 1 else None

    def missing(run: Run) -> None:
        # Another process may have written it since.
        if not os.path.isfile(result_file(results, run)):
            execute(run, work, results, train_net, threads)

    # Runs that are done count from the start, so that the time left is that of the others.
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", unit="run")
    with bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(missing, run) for run in todo]
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except RunFailed as e:
                    failures.append(str(e))
                bar.update()
        except BaseException:  # such as Ctrl-C
            # Leaving the pool would train all other runs first.
            pool.shutdown(wait=False, cancel_futures=True)
            for training in list(_trainings):
                training.terminate()
            raise
    return failures
