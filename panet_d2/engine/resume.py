"""Continue a run with a config that may differ from the one it had so far."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Tuple

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier
from detectron2.utils.file_io import PathManager
from torch.optim.lr_scheduler import LRScheduler

from ..check_config import flatten
from ..errors import CheckpointError


def changed_keys(cfg: CfgNode) -> Dict[str, Tuple[Any, Any]]:
    """
    Args:
        cfg (CfgNode): the config to continue with.

    Returns:
        dict: by key, the values of ``cfg`` and of the run's ``config.yaml`` in its ``OUTPUT_DIR``,
        where they differ. Empty if there is no such file.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not PathManager.isfile(path):
        return {}
    with PathManager.open(path, "rb") as f:
        before = dict(flatten(yaml.safe_load(f) or {}))
    now = dict(flatten(yaml.safe_load(cfg.dump())))
    # A key that only one of them has belongs to another version of Detectron2 or this package.
    return {k: (now[k], before[k]) for k in now.keys() & before.keys() if now[k] != before[k]}


# The entries of an optimizer's parameter groups that come from the config. Others, such as "fused",
# belong to the state.
_FROM_CONFIG = (
    "lr",
    "initial_lr",
    "momentum",
    "dampening",
    "nesterov",
    "weight_decay",
    "betas",
    "eps",
)
Groups = List[Dict[str, Any]]


def check_groups(saved: Groups, ours: Groups) -> None:
    """
    Check that the state of an optimizer can be loaded.

    Args:
        saved, ours (list[dict]): parameter groups of the checkpoint and of the run to continue.

    Raises:
        CheckpointError: naming the keys.
    """
    if [set(_FROM_CONFIG) & set(g) for g in saved[:1]] != [
        set(_FROM_CONFIG) & set(g) for g in ours[:1]
    ]:
        raise CheckpointError(
            "OUTPUT_DIR holds a run with another optimizer; to resume it, SOLVER.OPTIMIZER must "
            "stay as it was."
        )
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in ours]:
        raise CheckpointError(
            "OUTPUT_DIR holds a run whose optimizer groups the parameters in another way; to "
            "resume it, SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS and BIAS_LR_FACTOR must stay "
            "as they were."
        )


def settings(optimizer: torch.optim.Optimizer) -> Groups:
    """Return what the config says about each parameter group."""
    return [{k: g[k] for k in _FROM_CONFIG if k in g} for g in optimizer.param_groups]


def apply_settings(
    optimizer: torch.optim.Optimizer, groups: Groups, scheduler: LRScheduler
) -> None:
    """
    Put the config's settings in place of those that a checkpoint brought.

    Args:
        optimizer (Optimizer): with its state loaded.
        groups (list[dict]): from :func:`settings`, before that.
        scheduler (LRScheduler): of the optimizer, with its state loaded.
    """
    for group, values in zip(optimizer.param_groups, groups):
        group.update(values)
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = lr
