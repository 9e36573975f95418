from __future__ import annotations

from pathlib import Path
from typing import NoReturn, Optional, Union

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..config import add_panet_config

# An installed package contains configs/; a checkout has configs/ at the top.
_HERE = Path(__file__).resolve()
_FOLDERS = (_HERE.parent / "configs", _HERE.parents[2] / "configs")


def get_checkpoint_url(config_path: str) -> NoReturn:
    """Raise a RuntimeError, because panet_d2 publishes no trained weights."""
    raise RuntimeError(
        f"Pretrained model for {config_path} is not available! panet_d2 publishes no trained "
        "weights; tools/convert_weights.py converts those of other projects."
    )


def get_config_file(config_path: str) -> str:
    """
    Return the full path of a file in "configs/", such as
    "COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml"; raise a RuntimeError if there is none.
    """
    for folder in _FOLDERS:
        if (folder / config_path).is_file():
            return str(folder / config_path)
    raise RuntimeError(f"{config_path} not available in panet_d2's model zoo!")


def get_config(config_path: str, trained: bool = False) -> Union[CfgNode, DictConfig]:
    """
    Load a config of this package.

    Args:
        config_path (str): see :func:`get_config_file`.
        trained (bool): True raises a RuntimeError, because there are no trained weights.

    Returns:
        CfgNode or omegaconf.DictConfig: a CfgNode with PANet's keys for a YAML file, a LazyConfig
        for a Python file.
    """
    cfg_file = get_config_file(config_path)
    if trained:
        get_checkpoint_url(config_path)
    if cfg_file.endswith(".py"):
        return LazyConfig.load(cfg_file)
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.merge_from_file(cfg_file)
    return cfg


def get(config_path: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """
    Build the model of a config, in training mode, and load the weights that the config names.

    Args:
        config_path, trained: see :func:`get_config`.
        device (str or None): None for the config's device, or for "cpu" if there is no CUDA.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model = instantiate(cfg.model)
        model = model if device is None else model.to(device)
        weights = cfg.get("train", {}).get("init_checkpoint", "")
    DetectionCheckpointer(model).load(weights)
    return model
