"""Run a function in one or several processes."""

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


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """
    Run ``main(args)`` in every process of the job: in the processes of torchrun, or else in
    ``args.num_gpus`` processes on this machine that Detectron2 starts. SIGTERM is passed on to all
    of them. Without CUDA, they run on the CPU.

    Args:
        main (callable): the function.
        args (Namespace): from :func:`detectron2.engine.default_argument_parser`.

    Raises:
        SystemExit: if SIGTERM stopped training, or if one of several processes printed an error
            that the user can fix.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_in_torchrun(main, args)
        return
    if args.num_gpus * args.num_machines > 1:
        # A scheduler may know and signal only this process, the parent.
        signal.signal(signal.SIGTERM, _pass_on)
        main = partial(_run_in_child, main)
    try:
        detectron2_launch(
            main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,)
        )
    except ProcessExitedException as e:
        if e.exit_code not in (STOPPED, FAILED):
            raise
        sys.exit(e.exit_code)


def _run_in_torchrun(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Detectron2's timeout, because the others wait while the first process checks images.
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        main(args)
    finally:
        dist.destroy_process_group()


def _run_in_child(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Print errors that the user can fix, for which the parent would print two tracebacks."""

    def child() -> None:
        main(args)  # the result is no exit status

    sys.exit(run(child, errors=(PanetError,)))


def _pass_on(signum: int, frame: Any) -> None:
    for process in multiprocessing.active_children():
        process.terminate()
