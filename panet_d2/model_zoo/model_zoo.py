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

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

# The built package has the configs inside. A checkout has them at its top.
_FOLDERS = (
    Path(__file__).resolve().parent / "configs",
    Path(__file__).resolve().parents[2] / "configs",
)


def get_checkpoint_url(config_path: str) -> NoReturn:
    """
    Where Detectron2's model zoo has the address of trained weights, this one says that there are
    none.

    Args:
        config_path (str): see :func:`get_config_file`.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"Pretrained model for {config_path} is not available! panet_d2 publishes no trained "
        "weights; tools/convert_weights.py converts those of others."
    )


def get_config_file(config_path: str) -> str:
    """
    Args:
        config_path (str): name of a config file relative to "configs/", e.g.
            "COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml".

    Returns:
        str: the real path of the file.

    Raises:
        RuntimeError: if there is no such file.
    """
    for folder in _FOLDERS:
        if (folder / config_path).is_file():
            return str(folder / config_path)
    raise RuntimeError(f"{config_path} not available in panet_d2's model zoo!")


def get_config(config_path: str, trained: bool = False) -> Union[CfgNode, DictConfig]:
    """
    Args:
        config_path (str): see :func:`get_config_file`.
        trained (bool): as in Detectron2's model zoo, and refused, because no trained weights are
            published. If False, ``MODEL.WEIGHTS`` (``train.init_checkpoint`` of a LazyConfig) is
            the file's, usually a backbone trained on ImageNet.

    Returns:
        CfgNode or omegaconf.DictConfig: the config of a YAML file, with PANet's keys; or that of a
        Python file.

    Raises:
        RuntimeError: if there is no such file, or ``trained`` is true.
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
    Build the model of a config and load the weights that it starts from, if it names any.

    Args:
        config_path (str): see :func:`get_config_file`.
        trained (bool): see :func:`get_config`.
        device (str or None): overwrites the config's device. By default that is the config's, or
            "cpu" where there is no CUDA.

    Returns:
        nn.Module: the model, in training mode.

    Raises:
        RuntimeError: see :func:`get_config`.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        if device is not None:
            cfg.MODEL.DEVICE = device
        model = build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return model
    model = instantiate(cfg.model)
    if device is not None:
        model = model.to(device)
    if "train" in cfg and "init_checkpoint" in cfg.train:
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    return model
