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

from ..cli import FAILED, run
from ..errors import PanetError
from .hooks import STOPPED

__all__ = ["launch"]


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
            with an error that the user can fix, which it has printed.
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
        if e.exit_code not in (STOPPED, FAILED):
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


def _one_sentence(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Print one sentence here, where the parent would print two tracebacks."""

    def child() -> None:
        main(args)

    status = run(child, errors=(PanetError,))
    if status:
        sys.exit(status)


def _pass_on(signum: int, frame: Any) -> None:
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, signum)
