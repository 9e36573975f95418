"""Config, checkpoint loading and predictor, shared by ``train_net.py``, the demo and the tools."""

from __future__ import annotations

import logging
import os
from typing import Iterable, Optional, Sequence

import detectron2.utils.comm as comm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from torch import nn
from yaml import YAMLError

from ..build import build
from ..check_config import check_values, flatten
from ..checkpoint import StrictCheckpointer
from ..checkpoint.strict_checkpoint import first_line
from ..config import add_panet_config
from ..data import setup_datasets
from ..errors import ConfigError
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
        raise ConfigError(f"{what}: {e.args[0] if isinstance(e, KeyError) else e}") from e
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
        CfgNode: not frozen. If ``MODEL.DEVICE`` is "" or not given, it is "cuda" or, without a CUDA
        device, "cpu".

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
    Check that ``MODEL.DEVICE`` works, and that the norms work on it.

    Raises:
        ConfigError: naming the key.
    """
    device = cfg.MODEL.DEVICE
    try:
        torch.zeros(1, device=device).item()
    except Exception as e:  # torch raises RuntimeError, AssertionError, NotImplementedError …
        reason = first_line(e).split(". ")[0].split(" (")[0][:200]
        raise ConfigError(
            f"MODEL.DEVICE is {device!r}, which PyTorch cannot use here ({reason}); set 'cpu', or "
            "'' for CUDA if there is a device."
        ) from e
    if torch.device(device).type != "cuda" and comm.get_world_size() > 1:
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
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        if stock and cfg.MODEL[head].AFP.ENABLED is True:
            raise ConfigError(
                f"MODEL.{head}.AFP.ENABLED is True, but MODEL.ROI_HEADS.NAME is {name!r}, which "
                "has no adaptive feature pooling; set PANetROIHeads or PANetCascadeROIHeads."
            )


def load_strict(model: nn.Module, weights: str) -> None:
    """
    Load a checkpoint into the model, in place. Every name and shape must match.

    Args:
        weights (str): path or URL, as in ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: if the checkpoint does not match or cannot be read.
    """
    StrictCheckpointer(model).load(weights, checkpointables=[])


def load_run(cfg: CfgNode, opts: Sequence[str] = ()) -> nn.Module:
    """
    Build the model of a finished run for inference.

    Args:
        cfg (CfgNode): the run's ``config.yaml``.
        opts (sequence[str]): the overrides in ``cfg``. The weights are ``MODEL.WEIGHTS`` if it is
            overridden or if ``OUTPUT_DIR`` has no ``model_final.pth``, else ``model_final.pth``.

    Raises:
        CheckpointError: see :func:`load_strict`.
    """
    final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    use_final = os.path.isfile(final) and "MODEL.WEIGHTS" not in opts
    model = build("the model", build_model, cfg).eval()
    load_strict(model, final if use_final else cfg.MODEL.WEIGHTS)
    return model


class Predictor(DefaultPredictor):
    """
    A :class:`DefaultPredictor` that rejects weights that do not match the model. Call it with a BGR
    image of shape (H, W, 3) to get the model's output for that image.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg (CfgNode): the config of the model; ``MODEL.WEIGHTS`` is its checkpoint.

        Raises:
            CheckpointError: see :func:`load_strict`.
            ConfigError: if a value cannot be used.
        """
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        load_strict(self.model, cfg.MODEL.WEIGHTS)


def latest_checkpoint(output_dir: str) -> Optional[str]:
    """Return the path of the last checkpoint that a run saved in its ``OUTPUT_DIR``, if any."""
    checkpointer = DetectionCheckpointer(nn.Module(), output_dir)
    return checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else None
