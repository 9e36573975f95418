"""Atomic writing of local files: the new file is complete, or the old file stays."""

from __future__ import annotations

import json
import math
import os
import secrets
from contextlib import contextmanager, suppress
from typing import IO, Any, Iterator
from urllib.parse import urlparse


@contextmanager
def atomic_open(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a local file for writing. The new content replaces the file when the block ends without an
    error. Until then, and after an error, the old file stays.

    Args:
        path (str): the file.
        mode (str): "w" or "wb".

    Raises:
        OSError: if the file cannot be written.
    """
    # Its own name for each writer: processes that write one file at once would mix their content.
    unfinished = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # otherwise the new name can reach the disk before the content
        os.replace(unfinished, path)
    except BaseException as e:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
        if isinstance(e, OSError) and e.filename == unfinished:
            e.filename = path  # the name that the user knows
        raise


def write_json(path: str, content: Any) -> None:
    """Write a JSON file with :func:`atomic_open`. NaN, which JSON does not have, becomes null."""
    with atomic_open(path) as f:
        json.dump(_without_nan(content), f, indent=1, allow_nan=False)
        f.write("\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


class AtomicPathManager:
    """A path manager of ``iopath`` that writes local files with :func:`atomic_open`."""

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        """Open a path or URL, see ``PathManager.open``. Use the result as a context manager."""
        if mode in ("w", "wb") and not urlparse(path).scheme:
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
