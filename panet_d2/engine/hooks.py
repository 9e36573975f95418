"""Hooks of the training loop that Detectron2 does not have."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, Optional

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, hooks

from .._detectron2 import restart_precise_bn

__all__ = ["STOPPED", "RestartPreciseBN", "StopOnSignal"]

# What a shell says of a process that SIGTERM has ended; so that `train && next` does not go on.
STOPPED = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class RestartPreciseBN(HookBase):
    """
    Lets Detectron2's PreciseBN begin with its loader's first batches each time, and not with those
    that follow on the last time's: a run that was resumed in between would not know those.
    """

    def __init__(self, hook: hooks.PreciseBN):
        """
        Args:
            hook (PreciseBN): stands before this one.
        """
        self.hook = hook

    def after_step(self) -> None:
        restart_precise_bn(self.hook)


class StopOnSignal(HookBase):
    """
    Ends training after the step that is under way when SIGTERM comes, as clusters send it before
    they take a machine away: with a checkpoint for ``--resume`` and exit status :data:`STOPPED`.
    With several processes, it is enough that one of them gets the signal.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, device: str):
        """
        Args:
            checkpointer (DetectionCheckpointer): saves the run.
            device (str): where the model is; what the processes tell each other goes by it.
        """
        self.checkpointer = checkpointer
        self.device = torch.device(device)
        self._asked = False
        self._before: Any = None

    def before_train(self) -> None:
        # Signals are the main thread's; training in another one goes without.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def after_step(self) -> None:
        """
        Raises:
            SystemExit: if it is time to stop, and there are steps left.
        """
        done = self.trainer.iter + 1
        if not self._any_asked() or done >= self.trainer.max_iter:
            return
        self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        logger.warning("Stopped by SIGTERM after %d steps; --resume goes on from there.", done)
        comm.synchronize()  # nobody leaves before the checkpoint is there
        raise SystemExit(STOPPED)

    def _ask(self, signum: int, frame: Optional[FrameType]) -> None:
        self._asked = True

    def _any_asked(self) -> bool:
        if comm.get_world_size() == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=self.device)
        dist.all_reduce(asked)
        return bool(asked)
