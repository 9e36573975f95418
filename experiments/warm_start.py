"""
Compare a PANet trained from scratch with PANets that start from a Mask R-CNN. Train the Mask R-CNN,
convert it with and without calibration, and train all three PANets on the same short schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Dict, List, Optional

import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import inference_context
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from panet_d2 import cli
from panet_d2.analysis import evaluations, read_history
from panet_d2.checkpoint import write_json
from panet_d2.checkpoint.convert import convert
from panet_d2.data import build_training_sample_loader
from panet_d2.engine import Trainer, load_strict, setup_config
from panet_d2.errors import ConfigError
from panet_d2.evaluation import build_evaluator

TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_net.py")
RUNS = {
    "scratch": "PANet from scratch",
    "warm": "PANet, warm start",
    "calibrated": "PANet, warm start, calibrated",
}


def train(config_file: str, output: str, *opts: str) -> None:
    """Train with train_net.py. Resume a run that was cut off, and keep a finished one."""
    if os.path.isfile(os.path.join(output, "model_final.pth")):
        return
    command = [sys.executable, TRAIN_NET, "--config-file", config_file, "--resume"]
    done = subprocess.run([*command, "OUTPUT_DIR", output, *opts])
    if done.returncode:
        raise ConfigError(f"training into {output} failed, see above.")


def training_ap(cfg: CfgNode, model: nn.Module, count: int) -> float:
    """Mask AP on a sample of the training images."""
    evaluator = build_evaluator(cfg, cfg.DATASETS.TRAIN[0], os.path.join(cfg.OUTPUT_DIR, "sample"))
    evaluator.reset()
    ids = []
    with inference_context(model), torch.no_grad():
        for inputs in build_training_sample_loader(cfg, count):
            evaluator.process(inputs, model(inputs))
            ids += [x["image_id"] for x in inputs]
    return evaluator.evaluate(img_ids=ids)["segm"]["AP"]


def at_step_0(cfg: CfgNode, weights: str, count: int) -> Dict[str, float]:
    """Mask AP of a checkpoint or of the initial weights, on training and validation images."""
    seed_all_rng(max(cfg.SEED, 0))
    model = DefaultTrainer.build_model(cfg)
    if weights:
        load_strict(model, weights)
    return {
        "training": training_ap(cfg, model, count),
        "validation": Trainer.test(cfg, model)["segm"]["AP"],
    }


def curve(metrics_file: str) -> Dict[int, float]:
    """Mask AP by the number of steps trained, from a run's metrics.json."""
    return {s: line["segm/AP"] for s, line in evaluations(read_history(metrics_file)).items()}


def table(results: Dict[str, dict]) -> str:
    """Markdown table of the results: a row for the donor and one for each way to start."""
    titles = {"donor": "Mask R-CNN, the donor", **RUNS}
    rows = [
        {
            "training images, step 0": results[run]["training"],
            "step 0": results[run]["validation"],
            **{f"step {step}": ap for step, ap in results[run].get("curve", {}).items()},
        }
        for run in titles
    ]
    frame = pd.DataFrame(rows, index=list(titles.values())).rename_axis("mask AP")
    return frame.astype(object).fillna("").to_markdown(tablefmt="github", floatfmt=".1f")


def compare(args: argparse.Namespace) -> Dict[str, dict]:
    def path(*parts: str) -> str:
        return os.path.join(args.output, *parts)

    os.makedirs(args.output, exist_ok=True)
    results: Dict[str, dict] = {}
    if os.path.isfile(path("results.json")):  # left by a comparison that was cut off
        with open(path("results.json"), encoding="utf-8") as f:
            results = json.load(f)

    def keep(run: str, values: dict) -> None:
        results.setdefault(run, {}).update(values)
        write_json(path("results.json"), results)

    arguments = {k: v for k, v in vars(args).items() if k != "output"}
    for key, before in results.get("arguments", arguments).items():
        if before != arguments.get(key):
            raise ConfigError(
                f"{args.output} holds another comparison: {key} was {before} there and is "
                f"{arguments.get(key)} now; set another --output."
            )
    keep("arguments", arguments)

    if not args.donor:
        train(args.donor_config, path("donor"), *args.opts)
    donor = args.donor or path("donor", "model_final.pth")
    donor_cfg = setup_config(args.donor_config, [*args.opts, "OUTPUT_DIR", path("donor")])
    cfg = setup_config(args.config_file, [*args.opts, "OUTPUT_DIR", path("step_0")])
    weights = {"scratch": "", "warm": path("warm.pth"), "calibrated": path("calibrated.pth")}
    if "donor" not in results:
        seed_all_rng(max(cfg.SEED, 0))
        convert("mask-rcnn", donor, weights["warm"], cfg)
        images = build_training_sample_loader(cfg, args.calibrate)
        convert("mask-rcnn", donor, weights["calibrated"], cfg, calibration=images)
        keep("donor", at_step_0(donor_cfg, donor, args.train_images))
    for run in RUNS:
        if run not in results:
            keep(run, at_step_0(cfg, weights[run], args.train_images))
    for run in RUNS:
        schedule = {
            "MODEL.WEIGHTS": weights[run],
            "SOLVER.MAX_ITER": args.steps,
            "SOLVER.STEPS": [],
            "SOLVER.CHECKPOINT_PERIOD": args.every,
            "TEST.EVAL_PERIOD": args.every,
        }
        opts = [str(part) for pair in schedule.items() for part in pair]
        train(args.config_file, path(run), *args.opts, *opts)
        keep(run, {"curve": curve(path(run, "metrics.json"))})
    return results


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.warm_start", description=__doc__)
    parser.add_argument("--config-file", required=True, help="config of the PANet")
    parser.add_argument("--donor-config", required=True, help="config of the Mask R-CNN")
    parser.add_argument("--donor", help="weights of the Mask R-CNN; trained if not given")
    parser.add_argument("--output", required=True, help="folder for runs and results")
    parser.add_argument("--steps", type=int, default=120, help="length of the short schedule")
    parser.add_argument("--every", type=int, default=30, help="steps between evaluations")
    parser.add_argument(
        "--calibrate", type=int, default=32, help="number of images for calibration"
    )
    parser.add_argument("--train-images", type=int, default=100, help="number evaluated at step 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
    args = parser.parse_args(argv)
    for name in ("detectron2", "panet_d2"):
        setup_logger(name=name)
    results = compare(args)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
