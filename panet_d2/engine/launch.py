"""Start a function in as many processes as asked for, however they come to be."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from functools import partial
from typing import Any, Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..checkpoint import CheckpointError
from ..config import ConfigError
from ..data import DataError
from .hooks import STOPPED
from .trainer import TrainingDiverged

__all__ = ["EXPECTED_ERRORS", "launch"]

# What says in one sentence what is wrong.
EXPECTED_ERRORS = (ConfigError, CheckpointError, DataError, TrainingDiverged)

_FAILED = 1  # what Python makes of sys.exit with a text


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """
    Run ``main(args)`` in every process of the job: in those that torchrun has started, where it
    has; else in ``args.num_gpus`` of this machine, started by Detectron2. SIGTERM reaches all of
    them. Without CUDA they work on the CPU.

    Args:
        main (callable): what to run.
        args (Namespace): of :func:`detectron2.engine.default_argument_parser`.

    Raises:
        SystemExit: if training was stopped by SIGTERM; or if one of several processes has ended
            with one of :data:`EXPECTED_ERRORS`, which it has printed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _in_torchrun(main, args)
        return
    if args.num_gpus * args.num_machines > 1:
        # The processes are children of this one, which a scheduler knows.
        signal.signal(signal.SIGTERM, _pass_on)
        main = partial(_one_sentence, main)
    try:
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as e:
        if e.exit_code not in (STOPPED, _FAILED):
            raise
        sys.exit(e.exit_code)


def _in_torchrun(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # As long as Detectron2 waits for processes of its own: the first one checks images and
    # evaluates while the others do.
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        main(args)
    finally:
        dist.destroy_process_group()


def _one_sentence(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """What the parent would print with the tracebacks of both."""
    try:
        return main(args)
    except EXPECTED_ERRORS as e:
        sys.exit(f"error: {e}")


def _pass_on(signum: int, frame: Any) -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signum)
