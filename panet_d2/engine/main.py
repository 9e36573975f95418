"""The command line of ``train_net.py``."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from typing import Any, Dict, Iterator, Optional, Sequence

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.utils.logger import setup_logger

from ..build import build
from ..cli import run
from ..data import first_test_set
from ..errors import CheckpointError, ConfigError, PanetError
from ..evaluation import check_evaluators
from .config_file import find_config_file
from .defaults import latest_checkpoint, load_strict, setup_config
from .launch import FREE_PORT, launch
from .predictor import warn_of_other_classes
from .resume import changed_keys
from .trainer import Trainer

logger = logging.getLogger("panet_d2")


def setup(args: argparse.Namespace) -> CfgNode:
    """
    Make the frozen config, and set up logging, seed and output folder.

    Args:
        args (Namespace): from :func:`detectron2.engine.default_argument_parser`.

    Raises:
        ConfigError: if the config cannot be used.
        DataError: if a dataset cannot be used.
        CheckpointError: if ``OUTPUT_DIR`` holds another run.
    """
    with _replayed():
        return _setup(args)


def _setup(args: argparse.Namespace) -> CfgNode:
    if args.config_file:
        args.config_file = find_config_file(args.config_file)  # default_setup logs the file
    needed = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    cfg = setup_config(args.config_file, args.opts, needed)
    cfg.freeze()
    if args.eval_only:
        first_test_set(cfg)
    _check_output_folder(cfg.OUTPUT_DIR)
    Trainer.check_test_aug(cfg)
    check_evaluators(cfg)
    last = None if args.eval_only else latest_checkpoint(cfg.OUTPUT_DIR)
    if last and not args.resume:
        raise CheckpointError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds another run; continue that run with --resume, or "
            "set OUTPUT_DIR to another folder."
        )
    changes = changed_keys(cfg) if args.resume and not args.eval_only else {}
    if last and changes.pop("MODEL.WEIGHTS", None):
        logger.warning(
            f"This run continues from {last}; MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} is not used."
        )
    if changes:
        text = ", ".join(f"{key} {value!r} (was {old!r})" for key, (value, old) in changes.items())
        logger.warning(f"This run continues with other config values than it had so far: {text}.")
    default_setup(cfg, args)  # replaces config.yaml
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="panet_d2")
    return cfg


@contextmanager
def _replayed() -> Iterator[None]:
    """Keep early log records until the block has set up the log file, then write them to it."""
    if logger.handlers:  # the file of an earlier run of this process
        yield
        return
    early = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    logger.addHandler(early)
    try:
        yield
    finally:
        logger.removeHandler(early)
        # The root logger's handlers have these records already.
        nowhere = [] if logging.root.handlers else [logging.lastResort]
        for record in early.buffer:
            for handler in filter(None, logger.handlers or nowhere):
                handler.handle(record)


def _check_output_folder(folder: str) -> None:
    """Raise a ConfigError if ``OUTPUT_DIR`` cannot be written to."""
    if not comm.is_main_process() or "://" in folder:
        return
    try:
        os.makedirs(folder or ".", exist_ok=True)
        tempfile.TemporaryFile(dir=folder or ".").close()
    except OSError as e:
        raise ConfigError(
            f"OUTPUT_DIR is {folder!r}, which cannot be used as a folder to write to ({e}); set "
            "another one."
        ) from e


def train_or_evaluate(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """
    Train or evaluate in one process of the job. The main process returns the results.

    Raises:
        PanetError: see :func:`setup` and :class:`Trainer`.
    """
    cfg = setup(args)
    if args.eval_only:
        model = build("the model", Trainer.build_model, cfg)
        resumed = latest_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
        weights = resumed or cfg.MODEL.WEIGHTS
        warn_of_other_classes(cfg, load_strict(model, weights).get("categories"), weights)
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
    parser = default_argument_parser()
    # Detectron2's default is one port per user, with which a second job would fail.
    parser.set_defaults(dist_url=FREE_PORT)
    args = parser.parse_args(argv)
    # Not OSError, because a bug in a user's own augmentation or evaluator may raise it.
    return run(launch, train_or_evaluate, args, errors=(PanetError,))
