"""Timing of several candidates in turn, and of the parts of a model."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Optional

import torch

__all__ = ["PartTimes", "interleaved", "peak_memory"]


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    candidates: Dict[str, Callable[[], object]], device: str, repeats: int, warmup: int = 3
) -> Dict[str, List[float]]:
    """
    Time candidates in turn, so that a slow moment of the machine slows all of them.

    Args:
        candidates (dict[str, callable]): the candidates.
        device (str): where they run. A GPU is synchronized before and after each run.
        repeats (int): number of timed rounds.
        warmup (int): number of rounds before.

    Returns:
        dict[str, list[float]]: seconds of each round.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in candidates}
    for index in range(warmup + repeats):
        for name, run in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(run: Callable[[], object], device: str) -> Optional[int]:
    """
    Args:
        run (callable): called once.
        device (str): where it runs.

    Returns:
        int or None: peak of the GPU memory in bytes, above what was in use before. None on a CPU.
    """
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class PartTimes:
    """
    Seconds by part of a program. Parts may be nested: the time of an inner part does not count for
    the outer part.
    """

    def __init__(self, device: str):
        """
        Args:
            device (str): where it runs. A GPU is synchronized at the start and the end of each
                part, which makes the program slower.
        """
        self.device = device
        self.seconds: Dict[str, float] = defaultdict(float)
        self._open: List[List] = []  # name and start of the parts that have begun

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the context to the part ``name``."""
        now = self._now()
        if self._open:
            outer, start = self._open[-1]
            self.seconds[outer] += now - start
        self._open.append([name, now])
        try:
            yield
        finally:
            now = self._now()
            name, start = self._open.pop()
            self.seconds[name] += now - start
            if self._open:
                self._open[-1][1] = now

    def wrap(self, owner: object, attribute: str, name: str) -> Callable[[], None]:
        """
        Add the time of every call of ``owner.attribute`` to the part ``name``.

        Returns:
            callable: restores the attribute.
        """
        own = vars(owner).get(attribute)  # unlike getattr, keeps a staticmethod as it is
        original = getattr(owner, attribute)

        def counted(*args, **kwargs):
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, counted)
        return lambda: setattr(owner, attribute, own) if own else delattr(owner, attribute)

    def _now(self) -> float:
        _synchronize(self.device)
        return time.perf_counter()
