"""Error messages and exit statuses of the command-line tools."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Callable, Optional, Tuple, Type

from .errors import PanetError

FAILED = 1  # argparse exits with 2
INTERRUPTED = 130  # a shell's status for a program that Ctrl-C ends


def run(
    main: Callable[..., Optional[int]],
    *args: Any,
    errors: Tuple[Type[Exception], ...] = (PanetError, OSError),
) -> int:
    """
    Run a command-line tool.

    An error that the user can fix becomes one sentence on stderr. With the environment variable
    ``PANET_D2_DEBUG=1``, and for all other errors, Python prints the traceback.

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
    except errors as e:
        if os.environ.get("PANET_D2_DEBUG") == "1":
            raise
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
