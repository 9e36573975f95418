"""Conversion of checkpoint files from other projects."""

from __future__ import annotations

from typing import Iterable, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..build import build
from ..errors import CheckpointError
from .calibration import calibrate
from .mask_rcnn import warm_start
from .mmdet import mmdet_rules
from .release import add_norm_statistics, release_rules
from .rules import Conversion, apply_rules, save_whole
from .safe_load import load_untrusted, model_weights

KINDS = ("release", "mmdet", "mask-rcnn")


def convert(
    kind: str,
    source: str,
    output: str,
    cfg: CfgNode,
    allow_unmatched: Sequence[str] = (),
    calibration: Optional[Iterable[List[dict]]] = None,
) -> Conversion:
    """
    Convert a checkpoint for the model of a config.

    Args:
        kind (str): "release" for the authors' released checkpoints, "mmdet" for mmdetection's
            Faster R-CNN and Mask R-CNN with FPN or PAFPN, "mask-rcnn" to start a PANet from
            Detectron2's Mask R-CNN with FPN.
        source (str): the file to read. No code in the file is run.
        output (str): the ``.pth`` file to write.
        cfg (CfgNode): config of the model.
        allow_unmatched (sequence[str]): shell patterns of names that may match no rule; "release"
            and "mmdet" only.
        calibration (iterable[list[dict]] or None): training images for :func:`calibrate`;
            "mask-rcnn" only.

    Returns:
        Conversion: the weights and the account of every tensor.

    Raises:
        CheckpointError: if the source cannot be read or does not match the config, or ``output``
            does not end in ``.pth``.
        ConfigError: if the model cannot be built.
        OSError: if the output cannot be written.
    """
    if kind not in KINDS:
        raise CheckpointError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    weights = model_weights(load_untrusted(source), source)
    cpu_cfg = cfg.clone()
    cpu_cfg.defrost()
    cpu_cfg.MODEL.DEVICE = "cpu"
    model = build("the model", build_model, cpu_cfg).state_dict()
    try:
        if kind == "mask-rcnn":
            result = warm_start(weights, model, cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.RELU)
        else:
            rules = release_rules() if kind == "release" else mmdet_rules()
            result = apply_rules(weights, rules, allow_unmatched)
            if kind == "release":
                add_norm_statistics(result, model)
            result.check(model)
    except CheckpointError as e:
        raise CheckpointError(f"{source}: {e}") from None
    if calibration is not None:
        _calibrate(result, cfg, calibration)
    save_whole(result.state, output, f"panet_d2, converted from {kind}")
    return result


def _calibrate(result: Conversion, cfg: CfgNode, inputs: Iterable[List[dict]]) -> None:
    """Calibrate the copied layers of a warm start, and note the calibration in the account."""
    model = build("the model", build_model, cfg)
    model.load_state_dict(result.state)
    copied = {row.target.split(".")[1] for row in result.rows if row.action == "copied"}
    calibrate(model, inputs, copied)
    before = result.state
    result.state = {name: value.cpu() for name, value in model.state_dict().items()}
    for row in result.rows:
        if row.target and not before[row.target].equal(result.state[row.target]):
            row.note += ", calibrated"
