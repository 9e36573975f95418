"""Run a function in one or several processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial
from typing import Any, Callable
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..cli import FAILED, run
from ..errors import ConfigError, PanetError
from .hooks import STOPPED

FREE_PORT = "auto"  # --dist-url auto: Detectron2 takes any free port of this machine


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """
    Run ``main(args)`` in every process of the job. The processes are those of torchrun, or else
    ``args.num_gpus`` processes that Detectron2 starts on this machine. A SIGTERM is passed on to
    all processes. Without CUDA, the processes run on the CPU.

    Args:
        main (callable): the function to run.
        args (Namespace): from :func:`detectron2.engine.default_argument_parser`.

    Raises:
        ConfigError: if the arguments cannot be used.
        SystemExit: if SIGTERM stopped training, or if one of several processes printed an error
            that the user can fix.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_in_torchrun(main, args)
        return
    _check_arguments(args)
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


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise a ConfigError for an argument with which Detectron2 or torch would fail later."""
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and --num-machines is {args.num_machines}; both must "
            "be at least 1. Without CUDA, --num-gpus is the number of processes on the CPU."
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank is {args.machine_rank}; with --num-machines {args.num_machines} it "
            f"must be from 0 to {args.num_machines - 1}."
        )
    devices = torch.cuda.device_count()
    if devices and args.num_gpus > devices:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but this machine has {devices} GPUs. For processes on "
            "the CPU, set the environment variable CUDA_VISIBLE_DEVICES=''."
        )
    if args.num_gpus * args.num_machines == 1 or args.dist_url.startswith(("file://", "env://")):
        return
    if args.dist_url == FREE_PORT:
        if args.num_machines > 1:
            raise ConfigError(
                "--dist-url is missing; with several machines it must be the address of the first, "
                "such as tcp://10.0.0.1:29500."
            )
        return
    url = urlparse(args.dist_url)
    try:
        port = url.port
    except ValueError:  # not a number, or too large
        port = None
    if url.scheme != "tcp" or not url.hostname or not port:
        raise ConfigError(
            f"--dist-url is {args.dist_url!r}; it must be tcp://HOST:PORT with a free port of the "
            "first machine."
        )
    if args.machine_rank == 0:
        _check_port(args.dist_url, port)


def _check_port(url: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            raise ConfigError(
                f"--dist-url is {url!r}, whose port cannot be used ({e.strerror}); another job may "
                "have it, so name another port, or leave --dist-url out to use a free one."
            ) from e


def _run_in_torchrun(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Detectron2's timeout, because other processes wait while the first one checks images.
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        main(args)
    finally:
        dist.destroy_process_group()


def _run_in_child(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run and print errors that the user can fix. The parent would print two tracebacks."""

    def child() -> None:
        main(args)  # the result is not an exit status

    sys.exit(run(child, errors=(PanetError,)))


def _pass_on(signum: int, frame: Any) -> None:
    for process in multiprocessing.active_children():
        process.terminate()
