#!/usr/bin/env python
"""Train and evaluate PANet, and anything else that Detectron2 builds from a config."""

import argparse
import sys
from typing import Any, Dict

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.utils.logger import setup_logger

from panet_d2.checkpoint import CheckpointError
from panet_d2.engine import (
    EXPECTED_ERRORS,
    Trainer,
    latest_checkpoint,
    launch,
    load_for_inference,
    setup_config,
)
from panet_d2.evaluation import check_evaluators


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the config and set up logging, seed and output folder."""
    needed = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    cfg = setup_config(args.config_file, args.opts, needed)
    cfg.freeze()
    Trainer.check_test_aug(cfg)
    check_evaluators(cfg)
    if not (args.eval_only or args.resume) and latest_checkpoint(cfg.OUTPUT_DIR):
        # Before anything is written there.
        raise CheckpointError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds another run; continue it with --resume, or name "
            "another folder."
        )
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="panet_d2")
    return cfg


def main(args: argparse.Namespace) -> Dict[str, Any]:
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        resumed = latest_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
        load_for_inference(model, resumed or cfg.MODEL.WEIGHTS)
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


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    try:
        launch(main, args)
    except EXPECTED_ERRORS as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    invoke_main()
