"""Other people's checkpoints into PANets, from file to file."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..errors import CheckpointError
from .calibration import calibrate
from .mask_rcnn import warm_start
from .mmdet import mmdet_rules
from .release import release_may_initialise, release_rules
from .rules import Conversion, apply_rules, save_whole
from .safe_load import load_untrusted, model_weights

__all__ = ["KINDS", "convert"]

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
    Convert a checkpoint into one of the model of a config.

    Args:
        kind (str): "release" for the authors' released checkpoints, "mmdet" for mmdetection's
            Faster and Mask R-CNN with PAFPN, "mask-rcnn" to start a PANet from a Mask R-CNN with
            FPN of Detectron2.
        source (str): the file to read. It is not trusted: nothing in it is run.
        output (str): the ``.pth`` to write, whole or not at all.
        cfg (CfgNode): config of the model.
        allow_unmatched (sequence[str]): shell patterns of names that may be left out though no
            rule says so; "release" and "mmdet" only.
        calibration (iterable[list[dict]] or None): batches of training images, as the model takes
            them for inference, for :func:`calibrate`; "mask-rcnn" only.

    Returns:
        Conversion: the account of every tensor.

    Raises:
        CheckpointError: if the source cannot be read or does not fit the config, or the output
            cannot be named so.
        ConfigError: if the config cannot be built.
        OSError: if the output cannot be written.
    """
    if kind not in KINDS:
        raise CheckpointError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    weights = model_weights(load_untrusted(source), source)
    cpu_cfg = cfg.clone()
    cpu_cfg.defrost()
    cpu_cfg.MODEL.DEVICE = "cpu"
    model = {name: value.detach() for name, value in build_model(cpu_cfg).state_dict().items()}
    try:
        if kind == "mask-rcnn":
            result = warm_start(weights, model, cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.RELU)
        else:
            rules = release_rules() if kind == "release" else mmdet_rules()
            result = apply_rules(weights, rules, allow_unmatched)
            may_initialise = release_may_initialise if kind == "release" else lambda name: None
            result.complete(model, may_initialise)
    except CheckpointError as e:
        raise CheckpointError(f"{source}: {e}") from None
    if calibration is not None:
        _calibrate(result, cfg, calibration)
    save_whole(result.state, output, f"panet_d2, converted from {kind}")
    return result


def _calibrate(result: Conversion, cfg: CfgNode, inputs: Iterable[List[dict]]) -> None:
    """Calibrate the adaptation layers of a warm start, and note it in the account."""
    model = build_model(cfg)
    model.load_state_dict(result.state)
    copied = {row.target.split(".")[1] for row in result.rows if row.action == "copied"}
    calibrate(model, inputs, copied)
    before = result.state
    result.state = {name: value.cpu() for name, value in model.state_dict().items()}
    result.rows = [
        replace(row, note=f"{row.note}, calibrated")
        if row.target and not before[row.target].equal(result.state[row.target])
        else row
        for row in result.rows
    ]
