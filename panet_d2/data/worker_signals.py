"""Signals in the worker processes of a data loader."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache

from torch.utils.data import get_worker_info


def leave_sigterm_to_parent() -> None:
    """
    Make a data loader's worker ignore SIGTERM unless its parent sent the signal. Does nothing in
    other processes.

    Schedulers send SIGTERM to all processes of a job. A worker that ended would fail the training
    before the parent has saved the run.
    """
    if get_worker_info() is not None:
        _block_sigterm()


@cache  # once per process
def _block_sigterm() -> None:
    if not hasattr(signal, "sigwaitinfo"):  # on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
