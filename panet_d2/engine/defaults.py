"""What train_net.py, the demo and the tools share: Detectron2's defaults, made strict."""

from __future__ import annotations

import logging
import os
from typing import Iterable, Optional, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from torch import nn
from yaml import YAMLError

from ..checkpoint import StrictCheckpointer
from ..config import add_panet_config
from ..data import setup_datasets
from ..errors import ConfigError

__all__ = [
    "Predictor",
    "latest_checkpoint",
    "load_strict",
    "load_run",
    "read_config",
    "setup_config",
]

logger = logging.getLogger("panet_d2")


def read_config(config_file: str, opts: Iterable[str] = ()) -> CfgNode:
    """
    Args:
        config_file (str): path of a YAML file; "" for none.
        opts (list[str]): overrides, KEY VALUE KEY VALUE …

    Returns:
        CfgNode: Detectron2's keys and PANet's, the file, the overrides.

    Raises:
        ConfigError: if the file, a key or a value cannot be used.
    """
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.MODEL.DEVICE = ""
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (OSError, KeyError, TypeError, ValueError, AssertionError, YAMLError) as e:
        # Each names the file or key; fvcore and yacs raise any of these.
        what = " ".join([config_file, *opts]).strip()
        raise ConfigError(f"{what}: {e.args[0] if isinstance(e, KeyError) else e}") from e
    return cfg


def setup_config(
    config_file: str, opts: Iterable[str] = (), needed: Sequence[str] = ("TRAIN", "TEST")
) -> CfgNode:
    """
    Make the config of a run, see :func:`read_config`, with its data sets registered and its
    device decided.

    Args:
        config_file, opts: see :func:`read_config`.
        needed (sequence[str]): which of the data sets will be used, see
            :func:`panet_d2.data.setup_datasets`.

    Returns:
        CfgNode: not frozen. ``MODEL.DEVICE`` is "cuda" where no device was named and there is
        one, else "cpu".

    Raises:
        ConfigError: if the file, a key or a value cannot be used.
        DataError: if its data cannot.
    """
    cfg = read_config(config_file, opts)
    if not cfg.MODEL.DEVICE:
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        if cfg.MODEL.DEVICE == "cpu":
            logger.warning("No CUDA device here and MODEL.DEVICE not given: running on the CPU.")
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch finds no CUDA device; 'cpu' works."
        )
    if "TRAIN" in needed and cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.ENABLED is True; on the CPU it must be False.")
    _check_roi_heads(cfg)
    setup_datasets(cfg, needed)
    return cfg


def _check_roi_heads(cfg: CfgNode) -> None:
    """Adaptive feature pooling that is asked for of heads which do not know it is a mistake."""
    name = cfg.MODEL.ROI_HEADS.NAME
    # Other people's heads may do as they like; an unknown name is the registry's to report.
    stock = name in ROI_HEADS_REGISTRY and ROI_HEADS_REGISTRY.get(name).__module__.startswith(
        "detectron2."
    )
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        if stock and cfg.MODEL[head].AFP.ENABLED is True:
            raise ConfigError(
                f"MODEL.{head}.AFP.ENABLED is True, but MODEL.ROI_HEADS.NAME is {name!r}, which "
                "has no adaptive feature pooling; PANetROIHeads and PANetCascadeROIHeads have."
            )


def load_strict(model: nn.Module, weights: str) -> None:
    """
    Load a checkpoint that must fit the model in every name and shape.

    Args:
        model (nn.Module): loaded in place.
        weights (str): path or URL, as in ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: if it does not fit, or cannot be read.
    """
    StrictCheckpointer(model).load(weights, checkpointables=[])


def load_run(cfg: CfgNode, opts: Sequence[str] = ()) -> nn.Module:
    """
    Args:
        cfg (CfgNode): the config of a run, for instance its ``config.yaml``.
        opts (sequence[str]): the overrides that it was read with.

    Returns:
        nn.Module: the run's model, for inference, with the weights that the run ended with;
        with ``MODEL.WEIGHTS`` where ``opts`` has it, or where ``OUTPUT_DIR`` has no such weights.

    Raises:
        CheckpointError: see :func:`load_strict`.
    """
    final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    ended = os.path.isfile(final) and "MODEL.WEIGHTS" not in opts
    model = build_model(cfg).eval()
    load_strict(model, final if ended else cfg.MODEL.WEIGHTS)
    return model


class Predictor(DefaultPredictor):
    """
    :class:`DefaultPredictor`, except that weights which do not fit the model are an error. Calling
    it with a BGR image of shape (H, W, 3) returns the model's output for that image.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg (CfgNode): the config of the model; ``MODEL.WEIGHTS`` names its checkpoint.

        Raises:
            CheckpointError: see :func:`load_strict`.
            ConfigError: if a value cannot work.
        """
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        load_strict(self.model, cfg.MODEL.WEIGHTS)


def latest_checkpoint(output_dir: str) -> Optional[str]:
    """
    Args:
        output_dir (str): an ``OUTPUT_DIR``.

    Returns:
        str or None: path of the last checkpoint that a run has saved there, if any.
    """
    checkpointer = DetectionCheckpointer(nn.Module(), output_dir)
    return checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else None
