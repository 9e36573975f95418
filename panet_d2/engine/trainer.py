"""Detectron2's trainer, with strict checkpoints and exact resume."""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections import OrderedDict
from math import isfinite
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import TORCH_VERSION
from detectron2.utils.logger import setup_logger
from torch import nn
from tqdm import tqdm

from .._detectron2 import LossHook, TrainingLoop, restart_precise_bn
from ..build import build
from ..check_config import check_values
from ..checkpoint import RunCheckpointer, StrictCheckpointer
from ..config import read_choice
from ..data import NamedImageMapper
from ..data.check import check_training_images
from ..data.train_loader import build_train_loader, seed_all
from ..errors import CheckpointError, TrainingDiverged
from ..evaluation import build_evaluator, check_evaluators
from ..modeling import RCNNWithTTA, check_test_aug
from ..modeling.check_model import forget_unread_keys
from ..modeling.roi_heads.mask_head import FCFusionBranch
from .defaults import latest_checkpoint, load_strict
from .hooks import StopOnSignal
from .resume import ResumableAMPTrainer, apply_settings, check_groups, settings

logger = logging.getLogger("panet_d2")


def _remember(loader: Iterable[List[dict]], current: List[dict]) -> Iterator[List[dict]]:
    """Yield the batches of ``loader``, and keep the last batch in ``current``."""
    for batch in loader:
        current[:] = batch
        yield batch


def _warn_of_frozen(model: nn.Module) -> None:
    """Warn if random weights are frozen and would never be trained."""
    frozen = sum(not p.requires_grad for p in model.parameters())
    if frozen or any(isinstance(m, FrozenBatchNorm2d) for m in model.modules()):
        logger.warning(
            "MODEL.WEIGHTS is empty, so training starts from random weights, but %d parameters "
            "are frozen and will stay random. To train from scratch, set MODEL.BACKBONE.FREEZE_AT "
            "to 0 and MODEL.RESNETS.NORM to another norm than FrozenBN, such as GN.",
            frozen,
        )


class _FiniteLosses(LossHook):
    """Check the losses of this process, not only their mean over processes."""

    def check_losses(self, losses: Mapping[str, torch.Tensor]) -> None:
        values = {name: float(loss) for name, loss in losses.items()}
        if not all(isfinite(value) for value in values.values()):
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise FloatingPointError(f"a loss is not finite: {text}")


class _SimpleTrainer(_FiniteLosses, SimpleTrainer):
    pass


class _AMPTrainer(_FiniteLosses, ResumableAMPTrainer):
    pass


class Trainer(TrainingLoop):
    """
    Detectron2's trainer, which chooses the evaluator by dataset, names unreadable images and
    rejects checkpoints that do not match.

    With a ``SEED``, the random numbers of a step or an image depend only on the seed and on the
    number of the step or image. If the operations are deterministic, a run that was killed and
    resumed ends with exactly the weights of an uninterrupted run. SIGTERM saves the run
    (:class:`panet_d2.engine.hooks.StopOnSignal`). A checkpoint file is never incomplete.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg (CfgNode): the config of the run.

        Raises:
            ConfigError: if a value cannot be used.
            DataError: if an image of a user's own function cannot be used.
        """
        # A copy of DefaultTrainer.__init__, which has no methods to override for the loop, the DDP
        # model and the checkpointer.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            # In a program that has not set it up, nobody would see the losses.
            setup_logger(distributed_rank=comm.get_rank())
        check_values(cfg)
        classes = type(self).__mro__
        subclasses = classes[: classes.index(Trainer)]
        if not any({"build_evaluator", "test"} & vars(c).keys() for c in subclasses):
            check_evaluators(cfg)
        cfg = build("the trainer", DefaultTrainer.auto_scale_workers, cfg, comm.get_world_size())
        model = build("the model", self.build_model, cfg)
        optimizer = build("the optimizer", self.build_optimizer, cfg, model)
        self._batch: List[dict] = []  # the current batch
        loader = _remember(build("the training loader", self.build_train_loader, cfg), self._batch)
        parallel = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **parallel)
        loop = _AMPTrainer if cfg.SOLVER.AMP.ENABLED else _SimpleTrainer
        self.loop = loop(model, loader, optimizer)
        self.scheduler = build("the schedule", self.build_lr_scheduler, cfg, optimizer)
        self.checkpointer = RunCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            categories=cfg.DATASETS.CATEGORIES,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        """Return the parent's hooks and, before evaluation, :class:`StopOnSignal`."""
        ret: List[Optional[HookBase]] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.EvalHook):
                ret.append(StopOnSignal(self.checkpointer))
            ret.append(hook)
            if isinstance(hook, hooks.PreciseBN):
                # Otherwise PreciseBN continues with later batches each time, unlike after a resume.
                restart = hooks.CallbackHook(
                    after_step=lambda _, hook=hook: restart_precise_bn(hook)
                )
                ret.append(restart)
        return ret

    def train(self) -> Optional[OrderedDict]:
        """
        Train as :meth:`DefaultTrainer.train` does.

        Raises:
            DataError: if a training image cannot be used; checked when a run starts.
            TrainingDiverged: see :meth:`run_step`.
            SystemExit: if SIGTERM stopped training.
        """
        if not self.start_iter and comm.is_main_process():
            check_training_images(self.cfg)
        if self.start_iter >= self.max_iter:
            logger.warning(
                "The run in OUTPUT_DIR %s has all %d steps of SOLVER.MAX_ITER, so there is nothing "
                "to train; for more steps, set a larger SOLVER.MAX_ITER.",
                self.cfg.OUTPUT_DIR,
                self.max_iter,
            )
            if not os.path.isfile(os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")):
                # The run was killed between the last step's checkpoint and the final one.
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
            files = [image.get("file_name", "?") for image in self._batch]
            latest = {k: v for k, (v, _) in self.storage.latest().items() if "loss" in k}
            before = ", ".join(f"{name} {value:.4g}" for name, value in latest.items())
            raise TrainingDiverged(
                f"step {self.iter}: {e}. Losses of the step before: {before or 'unknown'}. "
                f"Images: {', '.join(files)}."
            ) from e

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        forget_unread_keys()
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        Return Detectron2's optimizer, or AdamW, with a learning rate of its own for the linear
        layers of fully-connected fusion.
        """
        solver, name = cfg.SOLVER, read_choice(cfg, "SOLVER.OPTIMIZER", ("SGD", "ADAMW"))
        slow = {
            parameter
            for path, module in model.named_modules()
            if isinstance(module, FCFusionBranch)
            for parameter, _ in module.fc.named_parameters(f"{path}.fc")
        }
        factor = cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda parameter: factor if parameter in slow else 1.0,
        )
        if name == "SGD":
            kind: type = torch.optim.SGD
            options = dict(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True)
        else:
            kind = torch.optim.AdamW
            # On the CPU the fused step takes a fifth of the time. Not on CUDA: a fused optimizer
            # undoes AMP's loss scale after gradient clipping, which is too late.
            fused = cfg.MODEL.DEVICE == "cpu" and TORCH_VERSION >= (2, 4)
            options = dict(fused=True) if fused else dict(foreach=True)
        optimizer = maybe_add_gradient_clipping(cfg, kind)
        return optimizer(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return Detectron2's scheduler without the ``SOLVER.STEPS`` that are not reached."""
        cfg, steps = cfg.clone(), cfg.SOLVER.STEPS
        cfg.defrost()
        # Detectron2 leaves out the steps after MAX_ITER, but fails at a step equal to MAX_ITER.
        cfg.SOLVER.STEPS = [step for step in steps if step < cfg.SOLVER.MAX_ITER]
        has_steps = cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
        if has_steps and len(cfg.SOLVER.STEPS) < len(steps):
            logger.warning(
                "SOLVER.STEPS is %s and SOLVER.MAX_ITER is %d: steps from MAX_ITER on are ignored.",
                list(steps),
                cfg.SOLVER.MAX_ITER,
            )
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start: int = 0) -> Iterable[List[dict]]:
        """Return the loader of :func:`panet_d2.data.train_loader.build_train_loader`."""
        return build_train_loader(cfg, NamedImageMapper(cfg, True), start)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[List[dict]]:
        def loader(cfg: CfgNode) -> Iterable[List[dict]]:
            mapper = NamedImageMapper(cfg, False)
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

        return build("the test loader", loader, cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        return build("the evaluator", build_evaluator, cfg, dataset_name, output_folder)

    @classmethod
    def check_test_aug(cls, cfg: CfgNode) -> None:
        """
        Check before training that test-time augmentation can run the model.

        Raises:
            ConfigError: if ``TEST.AUG`` is enabled and cannot be used.
        """
        check_test_aug(cfg)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate with test-time augmentation; "_TTA" is appended to the name of each task."""
        model = RCNNWithTTA(cfg, model)
        whole = cfg.clone()
        whole.defrost()
        # Make the views from the image in its file's size, so that it is not resized twice.
        whole.INPUT.MIN_SIZE_TEST = 0
        results: Dict[str, Any] = {}
        for name in cfg.DATASETS.TEST:
            loader = cls.build_test_loader(whole, name)
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            evaluator = cls.build_evaluator(cfg, name, folder)
            # In a log file, Detectron2's own lines show the progress.
            with tqdm(loader, desc=f"{name}, augmented", disable=None) as bar:
                results[name] = inference_on_dataset(model, bar, evaluator)
            if comm.is_main_process():
                logger.info("Results for %s with test-time augmentation:", name)
                print_csv_format(results[name])
        results = results[name] if len(results) == 1 else results
        return OrderedDict((f"{task}_TTA", values) for task, values in results.items())

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        Load the state of a run, but keep the config's learning rate, weight decay and so on.

        Raises:
            CheckpointError: if the state belongs to another optimizer, or has more steps than
                ``SOLVER.MAX_ITER``.
        """
        steps = state_dict["iteration"] + 1
        if steps > self.max_iter:
            raise CheckpointError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the run in OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR} already has {steps} steps; it must be at least {steps}."
            )
        optimizer, saved = self.loop.optimizer, state_dict["_trainer"]["optimizer"]
        check_groups(saved["param_groups"], optimizer.param_groups)
        configured = settings(optimizer)
        super().load_state_dict(state_dict)
        apply_settings(optimizer, configured, self.scheduler)

    def _loader_from(self, step: int) -> Iterable[List[Dict[str, Any]]]:
        """A training loader that goes on from this step, if a subclass's loader can."""
        try:
            inspect.signature(self.build_train_loader).bind(self.cfg, step)
        except TypeError:
            logger.warning(
                "%s.build_train_loader has no argument for the first step, so the run continues "
                "with other images than if it had not been stopped.",
                type(self).__name__,
            )
            return self.build_train_loader(self.cfg)
        return self.build_train_loader(self.cfg, step)

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Args:
            resume (bool): continue the run in ``OUTPUT_DIR``, if there is one. Otherwise start
                from ``MODEL.WEIGHTS``, where only the ResNet must match.

        Raises:
            CheckpointError: if the checkpoint does not match the model or cannot be read.
        """
        model, last = self.loop.model, latest_checkpoint(self.cfg.OUTPUT_DIR)
        if resume and not last:
            logger.warning(
                "OUTPUT_DIR %s has no checkpoint to resume; training starts from MODEL.WEIGHTS %r.",
                self.cfg.OUTPUT_DIR,
                self.cfg.MODEL.WEIGHTS,
            )
        if resume and last:
            load_strict(model, last)  # the parent would only log what does not match
        elif self.cfg.MODEL.WEIGHTS:
            checkpointer = StrictCheckpointer(model, required=("backbone.bottom_up.",))
            checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
            return
        super().resume_or_load(resume)
        if self.start_iter:
            self.loop.reset_data_loader(
                lambda: _remember(self._loader_from(self.start_iter), self._batch)
            )
        else:
            _warn_of_frozen(model)
