"""Errors that a config value causes while Detectron2 builds something from it."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from types import TracebackType
from typing import Any, Callable, Dict, List, NamedTuple, Optional, TypeVar

from detectron2.config import CfgNode
from detectron2.modeling import (
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_backbone,
)

from .check_config import flatten
from .errors import ConfigError, PanetError
from .modeling.check_model import is_architecture

T = TypeVar("T")

# Libraries that raise an error for a wrong value of their caller.
_LIBRARIES = {"torch", "torchvision", "numpy", "yacs", "fvcore", "iopath", "PIL"}
_STDLIB = sysconfig.get_path("stdlib")
# Packages that read config values. An error in any other code is a user's own.
_BUILDERS = {"detectron2", "panet_d2"}
# Functions that read a value for their caller.
_ACCESSORS = ("__getattr__", "__getitem__", "get", "read_choice")
_MOST_LETTERS = 300
_MOST_KEYS = 8  # in a message; more are no help


def build(what: str, function: Callable[..., T], cfg: CfgNode, *args: Any) -> T:
    """
    Build something from a config.

    Args:
        what (str): what is built, for the message: "the model".
        function (callable): called as ``function(cfg, *args)``. After an error, the function is
            called once more to record which keys it reads.
        cfg (CfgNode): the config.
        args: more arguments.

    Raises:
        ConfigError: for any error that a config value causes in Detectron2. The message names the
            keys that were read last.
        Exception: an error in a user's own code.
    """
    try:
        return function(cfg, *args)
    except PanetError:
        raise
    except Exception as e:
        if not _is_caused_by_config(e.__traceback__):
            raise
        raise ConfigError(_explain(what, e, function, cfg, args)) from e


def _is_caused_by_config(tb: Optional[TracebackType]) -> bool:
    owner = ""
    while tb is not None:
        frame = tb.tb_frame
        module = frame.f_globals.get("__name__", "").split(".")[0]
        in_stdlib = frame.f_code.co_filename.startswith(_STDLIB) and (
            "site-packages" not in frame.f_code.co_filename
        )
        if module not in _LIBRARIES and not in_stdlib:
            owner = module
        tb = tb.tb_next
    return owner in _BUILDERS


def _explain(
    what: str, error: Exception, function: Callable[..., Any], cfg: CfgNode, args: Any
) -> str:
    # str(KeyError) is in quotes; the first argument of an OSError is a number.
    first = error.args[0] if error.args and not isinstance(error, OSError) else error
    text = " ".join(str(first).split())
    if not text:  # a bare assertion
        text = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    text = text.split(" Exception raised from ")[0][:_MOST_LETTERS]  # torch adds its C++ stack
    if isinstance(error, KeyError):
        problem = _levels_problem(cfg)
        if problem:
            return problem
        if " " not in text:
            text = f"{text!r} is not known there"
    if any(key in text for key, _ in flatten(cfg)):
        return f"{what} cannot be built: {text}"
    reads = _reads(function, cfg, args)
    # The keys whose values are in the message, or else the keys that the last reader has read.
    chosen = [r for r in reads if _mentions(text, r.value, str)]
    if not 0 < len(chosen) <= 3:
        chosen = [r for r in reads if r.reader is reads[-1].reader]
        # A number can be in the message by chance.
        chosen.sort(key=lambda r: _mentions(text, r.value, (int, float)))
        chosen = chosen[-_MOST_KEYS:]
    values = ", ".join(f"{r.key} {r.value!r}" for r in chosen) or "its keys"
    return f"{what} cannot be built with {values}: {text}"


def _mentions(text: str, value: Any, kind: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_mentions(text, v, kind) for v in value)
    if not isinstance(value, kind) or value in ("", True, False):  # in many messages by chance
        return False
    return re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", text) is not None


def _levels_problem(cfg: CfgNode) -> Optional[str]:
    """Say which levels a head reads that the backbone does not have, if the backbone is built."""
    try:
        levels = list(build_backbone(cfg).output_shape())
    except Exception:
        return None  # the backbone is the problem
    readers = {
        "RPN": (GeneralizedRCNN, ProposalNetwork),
        "ROI_HEADS": (GeneralizedRCNN,),
        "SEM_SEG_HEAD": (PanopticFPN, SemanticSegmentor),
        "RETINANET": (RetinaNet,),
    }
    for node in (n for n, bases in readers.items() if is_architecture(cfg, *bases)):
        missing = [f for f in cfg.MODEL[node].IN_FEATURES if f not in levels]
        if missing:
            hint = ""
            if node == "RETINANET" and missing == ["p7"]:
                hint = " (build_retinanet_resnet_pafpn_backbone has p3 to p7)"
            return (
                f"MODEL.{node}.IN_FEATURES names {', '.join(missing)}, but the levels of "
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} are {', '.join(levels)}; "
                f"name some of these, or set another backbone{hint}."
            )
    return None


class _Read(NamedTuple):
    key: str
    value: Any
    reader: Any  # the code that reads it


class _Log(List[_Read]):
    """A list of reads that a config shares with its copies."""

    def __deepcopy__(self, memo: Any) -> _Log:
        return self


class _RecordingNode(CfgNode):
    """A config that records which values are read, and by which function."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        log = self.__dict__.get("_log")
        if log is not None and not isinstance(value, CfgNode):
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_name in _ACCESSORS:
                frame = frame.f_back
            log.append(_Read(self.__dict__["_path"] + name, value, frame.f_code))
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def record(self, log: _Log, path: str = "") -> None:
        for name, value in self.items():
            if isinstance(value, _RecordingNode):
                value.record(log, f"{path}{name}.")
        self.__dict__.update(_log=log, _path=path)


def _reads(function: Callable[..., Any], cfg: CfgNode, args: Any) -> List[_Read]:
    """Return what the function reads, in order. A key counts where it is read last."""
    log = _Log()
    recording = _RecordingNode(cfg)
    recording.record(log)
    try:
        function(recording, *args)
    except Exception:
        pass  # the error that is being explained
    last_reads: Dict[str, _Read] = {}
    for read in log:
        last_reads.pop(read.key, None)
        last_reads[read.key] = read
    return list(last_reads.values())
