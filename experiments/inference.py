"""
Compare the options of inference on the validation images of trained models: Soft-NMS, box voting
and test-time augmentation, each alone and together. Write results.json and README.md with a table
for each model. A comparison that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from typing import Any, Dict, List, Optional

import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, inference_context
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from experiments.benchmark.report import describe_machine
from panet_d2 import cli
from panet_d2.checkpoint import atomic_open, write_json
from panet_d2.engine import Trainer, load_strict, setup_config
from panet_d2.errors import ConfigError
from panet_d2.evaluation import build_evaluator
from panet_d2.modeling import RCNNWithTTA

# Detectron2's heads have only NMS; these are the same with the options.
HEADS = {"StandardROIHeads": "PANetROIHeads", "CascadeROIHeads": "PANetCascadeROIHeads"}
SOFT_NMS = {"TEST.SOFT_NMS.ENABLED": True}
VOTING = {"TEST.BOX_VOTING.ENABLED": True}
TURNS = {"TEST.AUG.FLIP": True, "TEST.AUG.VFLIP": True, "TEST.AUG.ROTATIONS": [90, 180, 270]}


def options(size: int) -> Dict[str, Dict[str, Any]]:
    """The config values of each row, for a model that is tested at ``INPUT.MIN_SIZE_TEST`` size."""
    # Detectron2's maximum would make the views of wide images smaller than they should be.
    one = {"TEST.AUG.ENABLED": True, "TEST.AUG.FLIP": False, "TEST.AUG.MAX_SIZE": 4000}
    one["TEST.AUG.MIN_SIZES"] = [size]
    scales = {**one, "TEST.AUG.MIN_SIZES": [round(size * f) for f in (0.75, 1, 1.5)]}
    by_size = {"TEST.AUG.BOX_SIZES": [32, 96]}  # COCO's small and large
    return {
        "one scale": {},
        "Soft-NMS, linear": SOFT_NMS,
        "Soft-NMS, gaussian": {**SOFT_NMS, "TEST.SOFT_NMS.METHOD": "gaussian"},
        "box voting": VOTING,
        "Soft-NMS and voting": {**SOFT_NMS, **VOTING},
        "horizontal flip": {**one, "TEST.AUG.FLIP": True},
        "flips and rotations": {**one, **TURNS},
        "aspect ratios 0.8 and 1.25": {**one, "TEST.AUG.ASPECT_RATIOS": [0.8, 1.25]},
        "three scales": scales,
        "three scales by box size": {**scales, **by_size},
        "three scales, masks as logits": {**scales, "TEST.AUG.MASKS": "logits"},
        "three scales, boxes fused": {**scales, "TEST.AUG.MERGE": "wbf"},
        "three scales, Soft-NMS and voting": {**scales, **SOFT_NMS, **VOTING},
        "all": {**scales, **by_size, **TURNS, **SOFT_NMS, **VOTING, "TEST.AUG.MASKS": "logits"},
    }


def read_model(config_file: str, opts: List[str]) -> CfgNode:
    """
    Read the config of a model, with heads that have the options.

    Raises:
        ConfigError: if ``INPUT.MIN_SIZE_TEST`` is 0, or there are several test sets.
    """
    cfg = setup_config(config_file, opts, needed=("TEST",))
    cfg.MODEL.ROI_HEADS.NAME = HEADS.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        raise ConfigError(
            f"{config_file}: INPUT.MIN_SIZE_TEST is 0; the scales need the size of the images."
        )
    if len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(f"{config_file}: DATASETS.TEST must name one dataset.")
    return cfg


def evaluate(cfg: CfgNode, weights: str, count: int) -> Dict[str, float]:
    """AP, seconds and forward passes an image, on the first ``count`` images; 0 for all."""
    plain = cfg.clone()
    if cfg.TEST.AUG.ENABLED:
        plain.TEST.AUG.ENABLED = False
        plain.INPUT.MIN_SIZE_TEST = 0  # the views are made from the image in its own size
    model = build_model(plain).eval()
    load_strict(model, weights)
    predict = RCNNWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model
    passes = predict.passes if cfg.TEST.AUG.ENABLED else 1
    name = cfg.DATASETS.TEST[0]
    loader = Trainer.build_test_loader(plain, name)
    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference"))
    if not isinstance(evaluator, COCOEvaluator):
        raise ConfigError(f"DATASETS.TEST names {name!r}, which is not evaluated as COCO is.")
    total = min(count or len(loader), len(loader))
    evaluator.reset()
    ids: List[Any] = []
    seconds = 0.0
    with inference_context(model), torch.no_grad():
        for _, inputs in zip(range(total), tqdm(loader, total=total, disable=None)):
            start = time.perf_counter()
            outputs = predict(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            evaluator.process(inputs, outputs)
            ids += [x["image_id"] for x in inputs]
    results = evaluator.evaluate(img_ids=ids)
    values = {"forward passes": passes, "s/image": seconds / max(1, len(ids)), "images": len(ids)}
    for task, title in (("bbox", "box"), ("segm", "mask")):
        for metric in ("AP", "AP50", "APs", "APm", "APl"):
            if task in results:
                values[f"{title} {metric}"] = results[task][metric]
    return values


def table(rows: Dict[str, Dict[str, float]]) -> str:
    """Markdown table of one model: a row for each option."""
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float).rename_axis("option")
    frame = frame.dropna(axis="columns", how="all")  # sizes that no object has
    columns = [c for c in frame.columns if c != "images"]
    digits = [
        ".0f" if c == "forward passes" else ".2f" if c == "s/image" else ".1f" for c in columns
    ]
    return frame[columns].to_markdown(tablefmt="github", floatfmt=("", *digits))


def report(results: Dict[str, Any]) -> str:
    """The README with all tables."""
    tables = [
        f"## {name}\n\n{rows['one scale']['images']:.0f} validation images.\n\n{table(rows)}\n"
        for name, rows in results["models"].items()
        if "one scale" in rows
    ]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    command = f"```sh\n{results['command']}\n```"
    text = (
        "What each row sets is in `experiments/inference.py`, what it does in `docs/inference.md`."
    )
    head = f"# Options of inference\n\n{text}\nMachine: {machine}.\n\n{command}\n"
    return "\n".join([head, *tables])


def compare(args: argparse.Namespace, command: str) -> Dict[str, Any]:
    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, "results.json")
    results: Dict[str, Any] = {"images": args.images, "models": {}}
    if os.path.isfile(path):  # left by a comparison that was cut off
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    if results["images"] != args.images:
        raise ConfigError(
            f"{args.output} holds a comparison of other images; set another --output."
        )
    results.update(
        command=command, machine=describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    )
    for name, config_file, weights in args.model:
        rows = results["models"].setdefault(name, {})
        cfg = read_model(config_file, [*args.opts, "OUTPUT_DIR", os.path.join(args.output, "run")])
        for row, values in options(cfg.INPUT.MIN_SIZE_TEST).items():
            if row in rows or (args.only and row not in args.only):
                continue
            option_cfg = cfg.clone()
            option_cfg.merge_from_list([part for pair in values.items() for part in pair])
            rows[row] = evaluate(option_cfg, weights, args.images)
            print(f"{name}, {row}: {rows[row]}", flush=True)
            write_json(path, results)
    with atomic_open(os.path.join(args.output, "README.md"), "w") as f:
        f.write(report(results))
    return results


def main(argv: Optional[List[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m experiments.inference", description=__doc__)
    parser.add_argument(
        "--model",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "CONFIG", "WEIGHTS"),
        help="a trained model; give it once for each model",
    )
    parser.add_argument("--output", required=True, help="folder for results")
    parser.add_argument("--images", type=int, default=0, help="how many of each dataset; 0 for all")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="some of the rows")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE …")
    args = parser.parse_args(argv)
    for name in ("detectron2", "panet_d2"):
        setup_logger(name=name)
    results = compare(args, shlex.join(["python", "-m", "experiments.inference", *argv]))
    print(report(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
