"""Error messages and exit statuses of the command-line tools."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import tempfile
from typing import Any, Callable, Iterable, Optional, Sequence, Tuple, Type

from .errors import DataError, PanetError

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
_NO_SHARED_MEMORY = "unable to write to file </torch"
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
    is_runtime = isinstance(error, RuntimeError)  # torch has a type of error for CUDA only
    if is_runtime and (text.startswith("DataLoader worker") or _NO_SHARED_MEMORY in text):
        stopped = text.partition(".")[0] if text.startswith("DataLoader worker") else ""
        what = stopped or "DataLoader worker failed"
        return (
            f"{what}, probably for lack of memory: lower DATALOADER.NUM_WORKERS, or give a "
            "container more shared memory (docker run --shm-size=8g)."
        )
    known = is_runtime and any(words in text for words in _OUT_OF_MEMORY)
    no_fork = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (known or no_fork or isinstance(error, MemoryError)):
        return ""
    reason = text.strip().split("\n")[0].partition(". GPU ")[0][:200]
    return (
        f"out of memory ({reason or type(error).__name__}): for training, lower "
        "SOLVER.IMS_PER_BATCH, INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED "
        "True on CUDA; for inference, lower INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST."
    )


def positive(text: str) -> int:
    """Read an argument that is a whole number from 1 on; the ``type`` of an argparse option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def make_way(files: Sequence[str], inputs: Iterable[str]) -> None:
    """
    Make the folders of the files that a tool will write, before the tool starts to work.

    Args:
        files (sequence[str]): files to write.
        inputs (iterable[str]): files that the tool reads.

    Raises:
        DataError: if a file is a folder or one of the inputs, or cannot be written.
    """
    kept = {os.path.realpath(path) for path in inputs}
    for file in files:
        if os.path.isdir(file) or os.path.realpath(file) in kept:
            raise DataError(f"{file} is a folder or an input, and will not be overwritten.")
    for folder in {os.path.dirname(file) or "." for file in files if not os.path.exists(file)}:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            raise DataError(f"no file can be written in {folder}: {e}.") from e
