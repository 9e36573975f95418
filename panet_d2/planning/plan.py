"""A config that follows from a dataset, with the reason for each value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
from detectron2.config import CfgNode

from .anchors import anchor_overlaps, scaled_sides, share_above
from .fingerprint import Fingerprint
from .hardware import Hardware
from .rules import (
    Choice,
    Choices,
    get,
    plan_anchors,
    plan_classes,
    plan_detections,
    plan_nms,
    plan_scale,
)
from .training_rules import plan_masks, plan_sampling, plan_schedule

Rule = Callable[[Fingerprint, CfgNode, Hardware], Choices]

# Each rule sees the values that the rules before it have set.
RULES: Tuple[Rule, ...] = (
    plan_classes,
    plan_scale,
    plan_anchors,
    plan_detections,
    plan_nms,
    plan_masks,
    plan_sampling,
    plan_schedule,
)


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        base (CfgNode): the config that the plan started from.
        cfg (CfgNode): the planned config.
        changed (dict[str, Choice]): the keys whose values differ from the base's.
        kept (dict[str, Choice]): the keys that were considered and keep the base's value.
    """

    base: CfgNode
    cfg: CfgNode
    changed: Choices
    kept: Choices

    def prediction(self, data: Fingerprint) -> Dict[str, Dict[str, float]]:
        """
        Predict from a dataset's boxes alone which share of the objects can be proposed.

        Returns:
            dict[str, dict[str, float]]: for the "base" and the "plan", the shares of objects that
            some anchor overlaps with an IoU of 0.5 and of 0.7, and the tenth percentile of the
            objects' sides in pixels at the test size. Empty if there are no objects or
            :func:`panet_d2.planning.anchor_overlaps` returns None.
        """
        found = {}
        for name, cfg in (("base", self.base), ("plan", self.cfg)):
            overlaps = anchor_overlaps(cfg, data)
            if overlaps is None or not len(overlaps):
                return {}
            found[name] = {
                "IoU 0.5": round(share_above(overlaps, 0.5), 4),
                "IoU 0.7": round(share_above(overlaps, 0.7), 4),
                "side of small objects": round(float(np.quantile(scaled_sides(cfg, data), 0.1)), 1),
            }
        return found


def make_plan(
    data: Fingerprint, base: CfgNode, hardware: Hardware, given: Dict[str, Tuple[Any, str]]
) -> Plan:
    """
    Apply all rules to a dataset.

    Args:
        data (Fingerprint): the training dataset.
        base (CfgNode): the config to start from; not changed.
        hardware (Hardware): the hardware to train on.
        given (dict[str, tuple]): keys that no rule decides, such as the datasets' names, each with
            a value and a reason.
    """
    cfg = base.clone()
    choices: Choices = {}
    rules: List[Rule] = [lambda *_: {k: Choice(*v) for k, v in given.items()}, *RULES]
    for rule in rules:
        decided = rule(data, cfg, hardware)
        for key, choice in decided.items():
            cfg.merge_from_list([key, choice.value])
        choices.update(decided)
    changed = {k: c for k, c in choices.items() if plain(c.value) != plain(get(base, k))}
    kept = {k: c for k, c in choices.items() if k not in changed}
    return Plan(base, cfg, changed, kept)


def plain(value: Any) -> Any:
    """Replace tuples by lists, because YAML has no tuples."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
