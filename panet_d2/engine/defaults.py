"""Config and checkpoint loading, shared by ``train_net.py``, the demo and the tools."""

from __future__ import annotations

import logging
from typing import Any, Dict, Iterable, Optional, Sequence

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import nn
from yaml import YAMLError

from ..check_config import check_values, flatten
from ..checkpoint import StrictCheckpointer
from ..checkpoint.safe_load import first_line
from ..config import add_panet_config
from ..data import setup_datasets
from ..errors import ConfigError
from ..modeling.check_model import heads_that_ask_for_afp
from .config_file import merge_config_file

logger = logging.getLogger("panet_d2")


def read_config(config_file: str, opts: Iterable[str] = ()) -> CfgNode:
    """
    Merge Detectron2's and PANet's keys with a YAML file and overrides.

    Args:
        config_file (str): path of the file, see
            :func:`panet_d2.engine.config_file.find_config_file`; "" for none.
        opts (iterable[str]): overrides, KEY VALUE KEY VALUE …

    Raises:
        ConfigError: if the file, a key or a value cannot be used.
    """
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.MODEL.DEVICE = ""
    try:
        if config_file:
            merge_config_file(cfg, config_file)
        cfg.merge_from_list(list(opts))
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AssertionError, YAMLError) as e:
        # fvcore and yacs raise all of these. Each message names the file or the key.
        what = " ".join([config_file, *opts]).strip()
        message = str(e.args[0] if isinstance(e, KeyError) else e)
        if message.startswith("Non-existent config key"):
            message += "; correct its spelling, or remove it"
        raise ConfigError(f"{what}: {message}") from e
    check_values(cfg)
    return cfg


def setup_config(
    config_file: str, opts: Iterable[str] = (), needed: Sequence[str] = ("TRAIN", "TEST")
) -> CfgNode:
    """
    Read a config with :func:`read_config`, register its datasets and choose its device.

    Args:
        config_file, opts: see :func:`read_config`.
        needed (sequence[str]): the ``DATASETS`` keys that will be used, see
            :func:`panet_d2.data.setup_datasets`.

    Returns:
        CfgNode: the config, not frozen. If ``MODEL.DEVICE`` is "" or not given, the device is
        "cuda" or, without a CUDA device, "cpu".

    Raises:
        ConfigError: if the file, a key or a value cannot be used.
        DataError: if a dataset cannot be used.
    """
    cfg = read_config(config_file, opts)
    if not cfg.MODEL.DEVICE:
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        if cfg.MODEL.DEVICE == "cpu":
            logger.warning("No CUDA device found and MODEL.DEVICE not set: running on the CPU.")
    check_device(cfg)
    if "TRAIN" in needed and cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.ENABLED is True; on the CPU it must be False.")
    _check_roi_heads(cfg)
    setup_datasets(cfg, needed)
    return cfg


def check_device(cfg: CfgNode) -> None:
    """
    Check that ``MODEL.DEVICE`` works, and that the norms work on this device.

    Raises:
        ConfigError: if not; the message names the key.
    """
    device = cfg.MODEL.DEVICE
    try:
        torch.zeros(1, device=device).item()
    except Exception as e:  # torch has no error type for this case
        reason = first_line(e).split(". ")[0].split(" (")[0][:200]
        raise ConfigError(
            f"MODEL.DEVICE is {device!r}, which PyTorch cannot use here ({reason}); set 'cpu', or "
            "'' for CUDA if there is a device."
        ) from e
    if torch.device(device).type != "cuda" and comm.get_world_size() > 1:
        if dist.is_initialized() and dist.get_backend() == "nccl":
            raise ConfigError(
                f"MODEL.DEVICE is {device!r}, but the processes were started for the GPUs of this "
                "machine; hide these with the environment variable CUDA_VISIBLE_DEVICES=''."
            )
        for key, value in flatten(cfg):
            if key.endswith(".NORM") and value == "SyncBN":
                raise ConfigError(
                    f"{key} is 'SyncBN', which needs CUDA in several processes; set "
                    "'naiveSyncBN', which works on the CPU."
                )


def _check_roi_heads(cfg: CfgNode) -> None:
    """Reject AFP keys with Detectron2's own heads, which would ignore them."""
    name = cfg.MODEL.ROI_HEADS.NAME
    heads = dict(ROI_HEADS_REGISTRY).get(name)  # the registry reports an unknown name later
    stock = heads is not None and heads.__module__.startswith("detectron2.")
    for head in heads_that_ask_for_afp(cfg):
        if stock:
            raise ConfigError(
                f"MODEL.{head}.AFP.ENABLED is True, but MODEL.ROI_HEADS.NAME is {name!r}, which "
                "has no adaptive feature pooling; set PANetROIHeads or PANetCascadeROIHeads."
            )


def load_strict(model: nn.Module, weights: str) -> Dict[str, Any]:
    """
    Load a checkpoint into the model, in place. Every name and shape must match.

    Args:
        weights (str): path or URL, as in ``MODEL.WEIGHTS``.

    Returns:
        dict: the content of the checkpoint without the weights.

    Raises:
        CheckpointError: if the checkpoint does not match or cannot be read.
    """
    return StrictCheckpointer(model).load(weights, checkpointables=[])


def latest_checkpoint(output_dir: str) -> Optional[str]:
    """Return the path of the last checkpoint that a run saved in its ``OUTPUT_DIR``, if any."""
    checkpointer = DetectionCheckpointer(nn.Module(), output_dir)
    return checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else None
