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


def run(
    main: Callable[..., Optional[int]],
    *args: Any,
    errors: Tuple[Type[Exception], ...] = (PanetError, OSError),
) -> int:
    """
    Run a command-line tool.

    An error that the user can fix, such as a missing optional package, becomes one sentence on
    stderr. With the environment variable ``PANET_D2_DEBUG=1``, and for all other errors, Python
    prints the traceback.

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
    handled: Tuple[Type[Exception], ...] = (*errors, ModuleNotFoundError)
    try:
        return main(*args) or 0
    except handled as e:
        message = str(e)
        if isinstance(e, ModuleNotFoundError):
            message = _MISSING.get(e.name or "", "")
            if not message:
                raise
        if os.environ.get("PANET_D2_DEBUG") == "1":
            raise
        # In one write, because several processes may have one stderr.
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
