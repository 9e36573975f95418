"""The command line of ``train_net.py``."""

from __future__ import annotations

import argparse
from typing import Any, Dict, Optional, Sequence

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.utils.logger import setup_logger

from ..cli import run
from ..errors import CheckpointError, PanetError
from ..evaluation import check_evaluators
from .defaults import latest_checkpoint, load_strict, setup_config
from .launch import launch
from .trainer import Trainer


def setup(args: argparse.Namespace) -> CfgNode:
    """
    Make the config, frozen, and set up logging, seed and output folder.

    Args:
        args (Namespace): from :func:`detectron2.engine.default_argument_parser`.

    Raises:
        ConfigError: if the config cannot be used.
        DataError: if a dataset cannot be used.
        CheckpointError: if ``OUTPUT_DIR`` holds another run.
    """
    needed = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    cfg = setup_config(args.config_file, args.opts, needed)
    cfg.freeze()
    Trainer.check_test_aug(cfg)
    check_evaluators(cfg)
    if not (args.eval_only or args.resume) and latest_checkpoint(cfg.OUTPUT_DIR):
        raise CheckpointError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds another run; continue that run with --resume, or "
            "set OUTPUT_DIR to another folder."
        )
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="panet_d2")
    return cfg


def train_or_evaluate(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """
    Train or evaluate in one process of the job. The main process returns the results.

    Raises:
        PanetError: see :func:`setup` and :class:`Trainer`.
    """
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        resumed = latest_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
        load_strict(model, resumed or cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [hooks.EvalHook(0, lambda: trainer.test_with_tta(cfg, trainer.model))]
        )
    return trainer.train()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or evaluate with Detectron2's arguments, by default ``sys.argv``; return the status."""
    args = default_argument_parser().parse_args(argv)
    # Not OSError, because a bug in a user's own augmentation or evaluator may raise it.
    return run(launch, train_or_evaluate, args, errors=(PanetError,))
