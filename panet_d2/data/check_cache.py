"""Remember which annotation files have no errors, so that the next start is faster."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from typing import Optional

from ..checkpoint.atomic import atomic_open
from .check_annotations import VERSION

logger = logging.getLogger("panet_d2")


@dataclass(frozen=True)
class FileState:
    """A file's absolute path without links, size in bytes and time of the last change."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class CheckedFile:
    """A file and the arguments of :func:`panet_d2.data.check_annotations`."""

    file: FileState
    masks: Optional[bool]
    evaluated: bool
    keypoints: int


def cache_folder(root: Optional[str] = None) -> str:
    """Return ``root``, by default ``PANET_D2_CACHE`` or ~/.cache/panet_d2, as an absolute path."""
    root = root or os.getenv("PANET_D2_CACHE") or os.path.join("~", ".cache", "panet_d2")
    return os.path.abspath(os.path.expanduser(root))


def file_state(path: str) -> Optional[FileState]:
    """Return the state of a local file, else None. Call it before you read the file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileState(os.path.realpath(path), status.st_size, status.st_mtime_ns)


def is_known_clean(checked: CheckedFile) -> bool:
    """Whether an earlier check found no error in this file."""
    try:
        with open(_record_path(checked), encoding="utf-8") as f:
            return json.load(f) == _record(checked)
    except (OSError, ValueError, RecursionError) as e:
        logger.debug("No record that the annotations were checked: %s", e)
        return False


def remember_clean(checked: CheckedFile) -> None:
    """Make :func:`is_known_clean` true, if the cache folder can be written."""
    path = _record_path(checked)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_open(path) as f:
            json.dump(_record(checked), f)
    except OSError as e:
        logger.debug("Cannot write %s (%s); the next start checks again.", path, e)


def _record(checked: CheckedFile) -> dict:
    return {"version": VERSION, **asdict(checked)}


def _record_path(checked: CheckedFile) -> str:
    # One path for all states of a file, so that old records do not pile up.
    arguments = (checked.masks, checked.evaluated, checked.keypoints)
    key = hashlib.sha256(repr((checked.file.path, arguments)).encode()).hexdigest()
    return os.path.join(cache_folder(), "checked_annotations", f"{key[:32]}.json")
