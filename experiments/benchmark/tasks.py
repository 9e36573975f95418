"""The tasks that are timed: one inference and one training step."""

from __future__ import annotations

from typing import Callable, List

import torch
from detectron2.utils.events import EventStorage
from torch import nn

__all__ = ["inference", "training_step"]


def inference(model: nn.Module, inputs: List[dict], amp: bool = False) -> Callable[[], List[dict]]:
    """
    Args:
        model (nn.Module): set to evaluation mode by each run.
        inputs (list[dict]): a batch, see :func:`experiments.benchmark.models.images`.
        amp (bool): use autocast to fp16.

    Returns:
        callable: runs the model on the batch.
    """
    device = next(model.parameters()).device.type

    @torch.no_grad()
    def run() -> List[dict]:
        with torch.autocast(device, dtype=torch.float16, enabled=amp):
            return model.eval()(inputs)

    return run


def training_step(model: nn.Module, inputs: List[dict], amp: bool = False) -> Callable[[], None]:
    """
    Args:
        model, inputs, amp: see :func:`inference`. Each run sets the model to training mode.

    Returns:
        callable: runs forward, backward and a step of SGD with learning rate zero. Another rate
        would change the detections of a model with random weights, and so the cost of the next run.
    """
    device = next(model.parameters()).device.type
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    scaler = torch.amp.GradScaler(device, enabled=amp)

    def run() -> None:
        model.train()
        with EventStorage(), torch.autocast(device, dtype=torch.float16, enabled=amp):
            loss = sum(model(inputs).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return run
