"""Resume a run with a config that may differ from the run's earlier config."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Tuple

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine.train_loop import AMPTrainer
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
        dict: for each key that differs, its values in ``cfg`` and in the run's ``config.yaml`` in
        ``OUTPUT_DIR``. Empty if this file does not exist.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not PathManager.isfile(path):
        return {}
    with PathManager.open(path, "rb") as f:
        before = dict(flatten(yaml.safe_load(f) or {}))
    now = dict(flatten(yaml.safe_load(cfg.dump())))
    # A key in only one of the configs belongs to another version of Detectron2 or this package.
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
        CheckpointError: if not; the message names the keys.
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
            "resume it, SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR, "
            "MODEL.BACKBONE.FREEZE_AT and MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR must stay as "
            "they were. For other values, start a new run with the old run's checkpoint as "
            "MODEL.WEIGHTS."
        )


def settings(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the settings of each parameter group that come from the config."""
    return [{k: g[k] for k in _FROM_CONFIG if k in g} for g in optimizer.param_groups]


def apply_settings(
    optimizer: torch.optim.Optimizer, groups: Groups, scheduler: LRScheduler
) -> None:
    """
    Replace the settings from a checkpoint by the config's settings.

    Args:
        optimizer (Optimizer): the optimizer, with its state loaded.
        groups (list[dict]): result of :func:`settings` before the state was loaded.
        scheduler (LRScheduler): the optimizer's scheduler, with its state loaded.
    """
    for group, values in zip(optimizer.param_groups, groups):
        group.update(values)
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = lr


class ResumableAMPTrainer(AMPTrainer):
    """Also continues a run without mixed precision, whose state has no scale of the loss."""

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state_dict})
