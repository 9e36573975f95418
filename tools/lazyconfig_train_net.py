#!/usr/bin/env python
"""Train and evaluate the model of a LazyConfig file, as train_net.py does for a YAML file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import OrderedDict
from typing import List, Optional

import detectron2.utils.comm as comm
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import (
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils.logger import setup_logger
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from panet_d2 import cli
from panet_d2.checkpoint import RunCheckpointer, StrictCheckpointer
from panet_d2.data import check_dataset_files
from panet_d2.data.register import check_num_classes
from panet_d2.engine import latest_checkpoint, launch, load_strict
from panet_d2.engine.resume import ResumableAMPTrainer
from panet_d2.errors import CheckpointError, ConfigError, PanetError

logger = logging.getLogger("panet_d2")


def setup(args: argparse.Namespace) -> DictConfig:
    """Make the config and set up logging, seed and output folder."""
    try:
        cfg = LazyConfig.load(args.config_file)
        LazyConfig.apply_overrides(cfg, args.opts)
    except (OSError, KeyError, ValueError, HydraException) as e:
        what = " ".join([args.config_file, *args.opts])
        message = e.args[0] if isinstance(e, KeyError) else str(e).splitlines()[0]
        raise ConfigError(f"{what}: {message}") from e
    if not (args.eval_only or args.resume) and latest_checkpoint(cfg.train.output_dir):
        # Checked before anything is written to the folder.
        raise CheckpointError(
            f"train.output_dir {cfg.train.output_dir} holds another run; continue it with "
            "--resume, or name another folder."
        )
    used = []
    for split in ("test",) if args.eval_only else ("train", "test"):
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
        for name in [names] if isinstance(names, str) else names or ():
            used.append(name)
            if name in DatasetCatalog:
                check_dataset_files(name, split == "test")
    for key in ("model.roi_heads.num_classes", "model.num_classes"):  # the latter is RetinaNet's
        number = OmegaConf.select(cfg, key)
        if number is not None:
            check_num_classes(key, number, used)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="panet_d2")
    # Detectron2's common config always names "cuda".
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device here: running on the CPU.")
        cfg.train.device = "cpu"
    if cfg.train.amp.enabled and cfg.train.device == "cpu":
        raise ConfigError("train.amp.enabled is True; on the CPU it must be False.")
    return cfg


def evaluate(cfg: DictConfig, model: nn.Module) -> OrderedDict:
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


def train(cfg: DictConfig, model: nn.Module, resume: bool) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer_class = ResumableAMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    # Detectron2 assumes that a model is on a GPU.
    parallel = {"device_ids": None} if cfg.train.device == "cpu" else {}
    trainer = trainer_class(
        create_ddp_model(model, **cfg.train.ddp, **parallel),
        instantiate(cfg.dataloader.train),
        optimizer,
    )
    start_iter = 0
    last = latest_checkpoint(cfg.train.output_dir) if resume else None
    if last:
        StrictCheckpointer(model, trainer=trainer).load(last)
        start_iter = trainer.iter + 1
    elif cfg.train.init_checkpoint:
        # Heads may be new, but the ResNet must match.
        StrictCheckpointer(model, required=["backbone.bottom_up."]).load(cfg.train.init_checkpoint)

    checkpointer = RunCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main_process = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
            if main_process
            else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            # Last, so that this hook writes what the others measure.
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if main_process
            else None,
        ]
    )
    trainer.train(start_iter, cfg.train.max_iter)


def train_or_evaluate(args: argparse.Namespace) -> None:
    cfg = setup(args)
    model = instantiate(cfg.model).to(cfg.train.device)
    if not args.eval_only:
        return train(cfg, model, args.resume)
    resumed = latest_checkpoint(cfg.train.output_dir) if args.resume else None
    if not (resumed or cfg.train.init_checkpoint):
        raise CheckpointError("train.init_checkpoint is empty; it must name a trained checkpoint.")
    load_strict(model, resumed or cfg.train.init_checkpoint)
    evaluate(cfg, model)


def main(argv: Optional[List[str]] = None) -> int:
    args = default_argument_parser().parse_args(argv)
    # Not OSError, because a bug in a user's own augmentation or evaluator may raise it.
    return cli.run(launch, train_or_evaluate, args, errors=(PanetError,))


if __name__ == "__main__":
    sys.exit(main())
