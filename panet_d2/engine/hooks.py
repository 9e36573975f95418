"""The hook that stops training on SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, Optional

import detectron2.utils.comm as comm
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase

# The shell's exit status of a process ended by SIGTERM, so that `train && next` stops.
STOPPED = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class StopOnSignal(HookBase):
    """
    Stop training on SIGTERM, which clusters send before they take a machine away. After the
    current step, the hook saves a checkpoint for ``--resume`` and exits with :data:`STOPPED`. With
    several processes, one process that gets the signal is enough.
    """

    def __init__(self, checkpointer: DetectionCheckpointer):
        self.checkpointer = checkpointer
        self._asked = False
        self._before: Any = None

    def before_train(self) -> None:
        # Only the main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def after_step(self) -> None:
        """
        Raises:
            SystemExit: if a process got SIGTERM and steps are left.
        """
        done = self.trainer.iter + 1
        # Detectron2 gathers over gloo, so that no process waits for its GPU.
        if not any(comm.all_gather(self._asked)) or done >= self.trainer.max_iter:
            return
        self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        logger.warning("Stopped by SIGTERM after %d steps. Continue with --resume.", done)
        comm.synchronize()  # no process may end before the checkpoint is written
        raise SystemExit(STOPPED)

    def _ask(self, signum: int, frame: Optional[FrameType]) -> None:
        self._asked = True
