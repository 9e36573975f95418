"""Error messages and exit statuses of the command-line tools."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Callable, Optional, Tuple, Type

from .errors import PanetError

FAILED = 1  # argparse exits with 2
INTERRUPTED = 130  # a shell's status for a program that Ctrl-C ends

# Packages that most uses do not need.
_MISSING = {
    "cv2": "OpenCV is not installed: pip install opencv-python, or opencv-python-headless on a "
    "server.",
    "pkg_resources": "Detectron2's model zoo needs the package pkg_resources: "
    "pip install 'setuptools<81'.",
}

# In torch's messages.
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "_STATUS_ALLOC_FAILED")


def run(
    main: Callable[..., Optional[int]],
    *args: Any,
    errors: Tuple[Type[Exception], ...] = (PanetError, OSError),
) -> int:
    """
    Run a command-line tool.

    An error that the user can fix, such as a missing optional package or too little memory, becomes
    one sentence on stderr. With the environment variable ``PANET_D2_DEBUG=1``, and for all other
    errors, Python prints the traceback.

    Args:
        main (callable): the tool. It returns an exit status, or None for 0.
        args: its arguments.
        errors (tuple[type]): the errors that the user can fix.

    Returns:
        int: the exit status; :data:`FAILED` after an error.
    """
    # Names in a dataset may have characters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(*args) or 0
    except Exception as e:
        message = str(e) if isinstance(e, errors) else _sentence(e)
        if not message or os.environ.get("PANET_D2_DEBUG") == "1":
            raise
        # In one write, because several processes may have one stderr.
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _sentence(error: Exception) -> str:
    """Return what to do about an error that is not this package's, or "" if it is not known."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        return _MISSING.get(error.name or "", "")
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return (
            f"{text.partition('.')[0]}, probably for lack of memory: lower DATALOADER.NUM_WORKERS, "
            "or give a container more shared memory (docker run --shm-size=8g)."
        )
    out_of_memory = isinstance(error, MemoryError) or (
        # torch has a type of error for CUDA only.
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )
    if not out_of_memory:
        return ""
    reason = text.strip().split("\n")[0].partition(". GPU ")[0][:200]
    return (
        f"out of memory ({reason or type(error).__name__}): for training, lower "
        "SOLVER.IMS_PER_BATCH, INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED "
        "True on CUDA; for inference, lower INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST."
    )
