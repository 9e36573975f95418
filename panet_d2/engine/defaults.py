"""What train_net.py, the demo and the tools share: Detectron2's defaults, made strict."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import Iterable, Optional, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import TORCH_VERSION
from torch import nn
from yaml import YAMLError

from ..checkpoint import StrictCheckpointer
from ..config import ConfigError, add_panet_config, checked
from ..data import NamedImageMapper, setup_datasets
from ..evaluation import build_evaluator

__all__ = ["Predictor", "Trainer", "load_for_inference", "setup_config"]

logger = logging.getLogger("panet_d2")

# What a checkpoint must bring to a training run: heads may be new, half a ResNet may not.
_REQUIRED_TO_TRAIN = ("backbone.bottom_up.",)


def setup_config(
    config_file: str, opts: Iterable[str] = (), needed: Sequence[str] = ("TRAIN", "TEST")
) -> CfgNode:
    """
    Make the config of a run: Detectron2's keys and PANet's, the file, the overrides; with its
    data sets registered and its device decided.

    Args:
        config_file (str): path of a YAML file; "" for none.
        opts (list[str]): overrides, KEY VALUE KEY VALUE …
        needed (sequence[str]): which of the data sets will be used, see
            :func:`panet_d2.data.setup_datasets`.

    Returns:
        CfgNode: not frozen. ``MODEL.DEVICE`` is "cuda" where no device was named and there is
        one, else "cpu".

    Raises:
        ConfigError: if the file, a key or a value cannot be used.
        DataError: if its data cannot.
    """
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.MODEL.DEVICE = ""
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (OSError, KeyError, ValueError, AssertionError, YAMLError) as e:
        # Each names the file or key; fvcore and yacs raise any of these.
        what = " ".join([config_file, *opts]).strip()
        raise ConfigError(f"{what}: {e.args[0] if isinstance(e, KeyError) else e}") from e
    if not cfg.MODEL.DEVICE:
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        if cfg.MODEL.DEVICE == "cpu":
            logger.warning("No CUDA device here and MODEL.DEVICE not given: running on the CPU.")
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch finds no CUDA device; 'cpu' works."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.ENABLED is True; on the CPU it must be False.")
    setup_datasets(cfg, needed)
    return cfg


def load_for_inference(model: nn.Module, weights: str) -> None:
    """
    Load a checkpoint that must fit the model in every name and shape.

    Args:
        model (nn.Module): loaded in place.
        weights (str): path or URL, as in ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: if it does not fit, or cannot be read.
    """
    StrictCheckpointer(model).load(weights, checkpointables=[])


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
            CheckpointError: see :func:`load_for_inference`.
            ConfigError: if a value cannot work.
        """
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        load_for_inference(self.model, cfg.MODEL.WEIGHTS)


class Trainer(DefaultTrainer):
    """
    Detectron2's trainer, with the evaluator picked by data set, unreadable images named, and
    checkpoints that do not fit refused.
    """

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if checked(cfg, "SOLVER.OPTIMIZER", ("SGD", "ADAMW")) == "SGD":
            return super().build_optimizer(cfg, model)
        # Groups and factors as Detectron2's build_optimizer makes them for SGD.
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        # On the CPU the fused step takes a fifth of the time. Not on CUDA: a fused optimizer undoes
        # AMP's loss scale after the gradients have been clipped, which is too late.
        fused = cfg.MODEL.DEVICE == "cpu" and TORCH_VERSION >= (2, 4)
        return adamw(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=fused
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, mapper=NamedImageMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=NamedImageMapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """
        Evaluate with test-time augmentation (``TEST.AUG``).

        Args:
            cfg (CfgNode): the config of the run.
            model (nn.Module): a trained model.

        Returns:
            OrderedDict: the results, with "_TTA" behind the name of each task.
        """
        logger.info("Evaluating with test-time augmentation …")
        evaluators = [
            cls.build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Args:
            resume (bool): continue the run in ``OUTPUT_DIR``, if there is one, instead of starting
                from ``MODEL.WEIGHTS``.

        Raises:
            CheckpointError: if the checkpoint does not fit the model, or cannot be read.
        """
        model, last = self._trainer.model, latest_checkpoint(self.cfg.OUTPUT_DIR)
        if resume and last:
            load_for_inference(model, last)  # raises where the parent would go on with half
        elif self.cfg.MODEL.WEIGHTS:
            StrictCheckpointer(model, required=_REQUIRED_TO_TRAIN).load(
                self.cfg.MODEL.WEIGHTS, checkpointables=[]
            )
            return
        super().resume_or_load(resume)


def latest_checkpoint(output_dir: str) -> Optional[str]:
    """
    Args:
        output_dir (str): an ``OUTPUT_DIR``.

    Returns:
        str or None: path of the last checkpoint that a run has saved there, if any.
    """
    checkpointer = DetectionCheckpointer(nn.Module(), output_dir)
    return checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else None
