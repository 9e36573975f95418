"""Files that are there as a whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import IO, Any, Iterator
from urllib.parse import urlparse

__all__ = ["AtomicPathManager", "atomic_open"]


@contextmanager
def atomic_open(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a local file for writing. What is written appears under its name when the block is left
    without an error; until then, and after an error, what was there before stays.

    Args:
        path (str): the file.
        mode (str): "w" or "wb".

    Yields:
        file object

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = path + ".part"
    try:
        with open(unfinished, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # or the name could reach the disk before the content
        os.replace(unfinished, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
        raise


class AtomicPathManager:
    """A path manager that writes local files by :func:`atomic_open`; all else is another's."""

    def __init__(self, path_manager: Any):
        """
        Args:
            path_manager (PathManager): what does the rest, see ``iopath``.
        """
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        """
        Args:
            path (str): a path or URL.
            mode (str): as for :func:`open`.
            kwargs: for the path manager.

        Returns:
            file object, to be used as a context manager.
        """
        if mode in ("w", "wb") and not urlparse(path).scheme:
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
