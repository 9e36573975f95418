"""Check, while Detectron2 builds a model, that the model does what its config asks for."""

from __future__ import annotations

import logging
from functools import cache, reduce
from typing import Any, List, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
)
from detectron2.modeling.anchor_generator import RotatedAnchorGenerator
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from fvcore.common.registry import Registry
from torch import nn

from .._detectron2 import compiled_ops_error
from ..categories import name_datasets
from ..errors import ConfigError

# A mixin that derived from Module would come after it in the order of methods.
_Module: Any = object

logger = logging.getLogger("panet_d2")

# Keys that only panet_d2.engine.Trainer reads, with the values that have no effect.
_TRAINER_KEYS = {
    "SOLVER.OPTIMIZER": "SGD",
    "MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR": 1.0,
    "INPUT.SAME_SIZE_PER_BATCH": False,
    "DATASETS.REGISTER_COCO": (),
    "DATASETS.CHECK_IMAGES": True,
}

# What the config of the last built model sets: keys of _TRAINER_KEYS, and TEST.AUG.ENABLED, which
# Detectron2's predictor ignores. Both lists are cleared when the model's mode is set.
_unread: List[str] = []
_augmented: List[str] = []


@cache
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


def is_architecture(cfg: CfgNode, *bases: type) -> bool:
    """Return whether ``MODEL.META_ARCHITECTURE`` is one of these classes or a subclass."""
    return _is_registered(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, *bases)


def _is_registered(registry: Registry, name: str, *bases: type) -> bool:
    found = dict(registry).get(name)
    return isinstance(found, type) and issubclass(found, bases)


def finds_oriented_boxes(cfg: CfgNode) -> bool:
    """Return whether the boxes of the config's model have an angle."""
    return is_architecture(cfg, GeneralizedRCNN) and _is_registered(
        PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME, RRPN
    )


def heads_that_ask_for_afp(cfg: CfgNode) -> List[str]:
    """Return the nodes of ``MODEL``, such as "ROI_BOX_HEAD", whose ``AFP.ENABLED`` is True."""
    keys = [f"ROI_{branch}_HEAD" for branch in ("BOX", "MASK", "KEYPOINT")]
    return [key for key in keys if cfg.MODEL[key].get("AFP", {}).get("ENABLED") is True]


def suppression_keys(cfg: CfgNode) -> List[str]:
    """Return the keys, such as "TEST.SOFT_NMS.ENABLED", that ask for more than NMS."""
    nodes = ("SOFT_NMS", "BOX_VOTING")
    return [f"TEST.{n}.ENABLED" for n in nodes if cfg.TEST.get(n, {}).get("ENABLED") is True]


def num_classes_node(cfg: CfgNode) -> Optional[str]:
    """Return the node of ``MODEL`` with the number of classes, if the architecture is known."""
    if is_architecture(cfg, GeneralizedRCNN):
        return "ROI_HEADS"
    return "RETINANET" if is_architecture(cfg, RetinaNet) else None


def check_model(cfg: CfgNode) -> None:
    """
    Check the config of a model that is being built. Note the keys that only
    :class:`panet_d2.engine.Trainer` reads, for :class:`TrainingNotice`. Copy the class names of
    ``DATASETS.CATEGORIES`` to the datasets' metadata, where other programs look for them.

    Args:
        cfg (CfgNode): any Detectron2 config.

    Raises:
        ConfigError: if the number of classes is 0 or ``DATASETS.CATEGORIES`` cannot be used. Also
            if the model finds oriented boxes, but one of its parts, or this Detectron2, supports
            upright boxes only.
    """
    node = num_classes_node(cfg)
    if node and cfg.MODEL[node].NUM_CLASSES == 0:
        raise ConfigError(
            f"MODEL.{node}.NUM_CLASSES is 0; set the number of classes, or call "
            "panet_d2.data.setup_datasets(cfg), which takes the number from the datasets, before "
            "the model is built."
        )
    if finds_oriented_boxes(cfg):
        _check_oriented_parts(cfg)
    if node:
        name_datasets(cfg, cfg.MODEL[node].NUM_CLASSES)
    forget_unread_keys()
    if cfg.TEST.AUG.ENABLED:
        _augmented.append("TEST.AUG.ENABLED")
    for key, nothing in _TRAINER_KEYS.items():
        *nodes, name = key.split(".")
        value = reduce(lambda node, part: node.get(part, {}), nodes, cfg).get(name, nothing)
        if name == "REGISTER_COCO":
            value = tuple(entry for entry in value if entry[0] not in DatasetCatalog)
        if value != nothing:
            _unread.append(f"{key} {value!r}")


def _check_oriented_parts(cfg: CfgNode) -> None:
    """
    Raise a ConfigError if a part of a model with oriented boxes needs upright boxes. Models with
    parts from outside of Detectron2 and this package are not checked.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    because = f"because MODEL.PROPOSAL_GENERATOR.NAME is {name!r} and finds oriented boxes"
    for node, registry, base, wanted in (
        ("ANCHOR_GENERATOR", ANCHOR_GENERATOR_REGISTRY, RotatedAnchorGenerator, ""),
        ("ROI_HEADS", ROI_HEADS_REGISTRY, RROIHeads, "PANetRROIHeads or "),
    ):
        part = cfg.MODEL[node].NAME
        found = dict(registry).get(part)
        if isinstance(found, type) and not found.__module__.startswith(
            ("detectron2.", "panet_d2.")
        ):
            return  # a user's own, with needs of its own
        if not _is_registered(registry, part, base):
            raise ConfigError(
                f"MODEL.{node}.NAME is {part!r}; it must be {wanted}{base.__name__}, {because}."
            )
    pooler = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    if pooler != "ROIAlignRotated":
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {pooler!r}; it must be ROIAlignRotated, {because}."
        )
    for node in ("RPN", "ROI_BOX_HEAD"):
        weights = cfg.MODEL[node].BBOX_REG_WEIGHTS
        if len(weights) != 5:
            raise ConfigError(
                f"MODEL.{node}.BBOX_REG_WEIGHTS is {weights}; it must have five numbers, {because}."
            )
    for key, on in (
        ("MODEL.MASK_ON", cfg.MODEL.MASK_ON),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED),
        *((key, True) for key in suppression_keys(cfg)),
    ):
        if on:
            raise ConfigError(f"{key} is {on}; it must be False, {because}.")
    error = compiled_ops_error()
    if error:
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {name!r}, which needs Detectron2's compiled "
            f"operators; build Detectron2 from its source, because they cannot be imported: {error}"
        )


def forget_unread_keys() -> None:
    """Drop the noted keys: for programs that read these keys."""
    _unread.clear()
    _augmented.clear()


class TrainingNotice(_Module):
    """
    A mixin for models that warns of config keys which the running program ignores.

    If the model's first mode is training, another trainer than :class:`panet_d2.engine.Trainer` has
    built the model. The warning names the keys that only this package's trainer reads. If the first
    mode is evaluation, the model is for prediction, and Detectron2's predictor ignores
    ``TEST.AUG``.
    """

    def train(self, mode: bool = True) -> nn.Module:
        if mode and _unread:
            warn_once(
                "The config has keys that only panet_d2.engine.Trainer (train_net.py) reads; this "
                f"program's trainer ignores them: {', '.join(_unread)}."
            )
        if not mode and _augmented:
            warn_once(
                "TEST.AUG.ENABLED is True, but predictions of this model have no test-time "
                "augmentation, unless panet_d2.engine.Predictor, train_net.py or a class such as "
                "RCNNWithTTA makes them."
            )
        forget_unread_keys()
        return super().train(mode)


_stock_retinanet_from_config = RetinaNet.from_config.__func__


# The signature must be the stock one, see roi_heads._from_config.
def _retinanet_from_config(cls: type, cfg: CfgNode) -> dict:
    for key in suppression_keys(cfg):
        raise ConfigError(
            f"{key} is True; MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has only NMS, "
            "so it must be False."
        )
    return _stock_retinanet_from_config(cls, cfg)


# No other code of this package sees the config of a stock RetinaNet, as with stock ROI heads.
RetinaNet.from_config = classmethod(_retinanet_from_config)
