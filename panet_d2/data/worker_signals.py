"""Which signals end the worker processes of a data loader."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache

from torch.utils.data import get_worker_info

__all__ = ["leave_sigterm_to_parent"]


def leave_sigterm_to_parent() -> None:
    """
    In a data loader's worker, end by the SIGTERM of the parent process alone. Elsewhere do nothing.

    Schedulers send SIGTERM to all processes of a job. A worker that ends by it ends training with
    an error, before the parent has saved the run.
    """
    if get_worker_info() is not None:
        _block_sigterm()


@cache  # once in a process
def _block_sigterm() -> None:
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
