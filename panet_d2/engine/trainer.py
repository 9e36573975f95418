"""Detectron2's trainer, made strict, and able to go on exactly where it was stopped."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from math import isfinite
from typing import Iterable, Iterator, List, Mapping, Optional

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
)
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import TORCH_VERSION
from torch import nn

from .._detectron2 import LossHook, TrainingLoop
from ..checkpoint import RunCheckpointer, StrictCheckpointer
from ..config import read_choice
from ..data import NamedImageMapper
from ..data.check import check_training_images
from ..data.train_loader import build_train_loader, seed_all
from ..errors import ConfigError, TrainingDiverged
from ..evaluation import build_evaluator
from .defaults import latest_checkpoint, load_strict
from .hooks import RestartPreciseBN, StopOnSignal

__all__ = ["Trainer"]

logger = logging.getLogger("panet_d2")

# What a checkpoint must bring to a training run: heads may be new, half a ResNet may not.
_REQUIRED_TO_TRAIN = ("backbone.bottom_up.",)


class _LastBatch:
    """A loader that remembers the batch that it gave last."""

    def __init__(self, loader: Iterable[List[dict]]):
        self.loader = loader
        self.batch: List[dict] = []

    def __iter__(self) -> Iterator[List[dict]]:
        for batch in self.loader:
            self.batch = batch
            yield batch


class _FiniteLosses(LossHook):
    """Every process looks at its own losses, not only at their mean."""

    def check_losses(self, losses: Mapping[str, torch.Tensor]) -> None:
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not all(isfinite(value) for value in values.values()):
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise FloatingPointError(f"a loss is not finite: {text}")


class _SimpleTrainer(_FiniteLosses, SimpleTrainer):
    pass


class _AMPTrainer(_FiniteLosses, AMPTrainer):
    pass


class Trainer(TrainingLoop):
    """
    Detectron2's trainer, with the evaluator picked by data set, unreadable images named, and
    checkpoints that do not fit refused.

    With a ``SEED``, each step draws its random numbers anew from the seed and its own number, and
    so does each image: a run that was killed and resumed ends in the weights of one that was not,
    exactly so wherever its operations are deterministic. Checkpoints are written as a whole or not
    at all, and on SIGTERM the run is saved (:class:`panet_d2.engine.hooks.StopOnSignal`).
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg (CfgNode): the config of the run.

        Raises:
            ConfigError: if a value cannot work.
        """
        # As DefaultTrainer's, whose loop, loader, parallel model and checkpointer cannot be
        # replaced one by one.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        parallel = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **parallel)
        loop = _AMPTrainer if cfg.SOLVER.AMP.ENABLED else _SimpleTrainer
        self.loop = loop(model, _LastBatch(loader), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RunCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        """
        Returns:
            list[HookBase]: the parent's; one behind PreciseBN that makes it repeatable; and before
            the writers, which come last, the one that heeds SIGTERM.
        """
        ret = super().build_hooks()
        place = next((i for i, h in enumerate(ret) if isinstance(h, hooks.PreciseBN)), None)
        if place is not None:
            ret.insert(place + 1, RestartPreciseBN(ret[place]))
        place = next((i for i, h in enumerate(ret) if isinstance(h, hooks.EvalHook)), len(ret))
        ret.insert(place, StopOnSignal(self.checkpointer, self.cfg.MODEL.DEVICE))
        return ret

    def train(self) -> Optional[OrderedDict]:
        """
        Returns:
            OrderedDict or None: see :meth:`DefaultTrainer.train`.

        Raises:
            DataError: if the run begins, and there are images that it cannot be trained on.
            TrainingDiverged: see :meth:`run_step`.
            SystemExit: if it was stopped by SIGTERM.
        """
        if not self.start_iter and comm.is_main_process():
            check_training_images(self.cfg)
        final = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
        if self.start_iter >= self.max_iter and not os.path.isfile(final):
            # Killed when the last step was saved, but not yet under this name.
            self.checkpointer.save("model_final", iteration=self.start_iter - 1)
        return super().train()

    def run_step(self) -> None:
        """
        Raises:
            TrainingDiverged: if a loss is NaN or infinite.
        """
        if self.cfg.SEED >= 0:
            seed_all(self.cfg.SEED, comm.get_rank(), self.iter)
        try:
            super().run_step()
        except FloatingPointError as e:
            files = [image.get("file_name", "?") for image in self.loop.data_loader.batch]
            latest = {k: v for k, (v, _) in self.storage.latest().items() if "loss" in k}
            before = ", ".join(f"{name} {value:.4g}" for name, value in latest.items())
            raise TrainingDiverged(
                f"step {self.iter}: {e}. Losses of the step before: {before or 'unknown'}. "
                f"Images: {', '.join(files)}."
            ) from e

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if read_choice(cfg, "SOLVER.OPTIMIZER", ("SGD", "ADAMW")) == "SGD":
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
    def build_train_loader(cls, cfg: CfgNode, start: int = 0) -> Iterable[List[dict]]:
        """
        Args:
            cfg (CfgNode): the config of the run.
            start (int): batches to leave out, because they were trained on before.

        Returns:
            iterable[list[dict]]: see :func:`panet_d2.data.train_loader.build_train_loader`.
        """
        return build_train_loader(cfg, NamedImageMapper(cfg, True), start)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[List[dict]]:
        return build_detection_test_loader(cfg, dataset_name, mapper=NamedImageMapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def check_test_aug(cls, cfg: CfgNode) -> None:
        """
        Say at once, and not after training, what :class:`GeneralizedRCNNWithTTA` cannot do.

        Args:
            cfg (CfgNode): the config of the run.

        Raises:
            ConfigError: if ``TEST.AUG`` is enabled and does not know the model.
        """
        if not cfg.TEST.AUG.ENABLED:
            return
        name = cfg.MODEL.META_ARCHITECTURE
        architecture = META_ARCH_REGISTRY.get(name)
        # Of a panoptic model it gives the instances alone, and the evaluators ask for the rest.
        if not issubclass(architecture, GeneralizedRCNN) or issubclass(architecture, PanopticFPN):
            raise ConfigError(
                f"TEST.AUG.ENABLED must be False with MODEL.META_ARCHITECTURE {name}: "
                "test-time augmentation is for GeneralizedRCNN."
            )
        for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
            if getattr(cfg.MODEL, key):
                raise ConfigError(f"TEST.AUG.ENABLED must be False where MODEL.{key} is True.")

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
        model, last = self.loop.model, latest_checkpoint(self.cfg.OUTPUT_DIR)
        if resume and last:
            load_strict(model, last)  # raises where the parent would go on with half
        elif self.cfg.MODEL.WEIGHTS:
            StrictCheckpointer(model, required=_REQUIRED_TO_TRAIN).load(
                self.cfg.MODEL.WEIGHTS, checkpointables=[]
            )
            return
        super().resume_or_load(resume)
        if self.start_iter:
            self.loop.reset_data_loader(
                lambda: _LastBatch(self.build_train_loader(self.cfg, self.start_iter))
            )
