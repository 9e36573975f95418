#!/usr/bin/env python
"""
Plan a config for a dataset in COCO format. The data determines image scale, anchors, numbers of
proposals and detections, sampling and schedule. Each value has a reason. The tool writes OUTPUT,
and next to it the measurements (OUTPUT without its ending, and _plan.json) and a picture of objects
and anchors (_plan.png).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode

from panet_d2 import cli
from panet_d2.check_config import check_values
from panet_d2.checkpoint import atomic_open
from panet_d2.data import setup_datasets
from panet_d2.engine import read_config
from panet_d2.engine.config_file import PREFIX
from panet_d2.planning import (
    Fingerprint,
    Hardware,
    Plan,
    config_text,
    fingerprint_table,
    make_plan,
    plot_plan,
    prediction_table,
    read_fingerprint,
    similar_files,
)

BASE = f"{PREFIX}COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml"


def given_values(args: argparse.Namespace, base: CfgNode) -> Dict[str, Tuple[Any, str]]:
    """Return the values that do not follow from the data."""
    name = os.path.splitext(os.path.basename(args.output or "planned"))[0]
    entries = [[f"{name}_train", *map(os.path.abspath, args.train)]]
    if args.val:
        entries.append([f"{name}_val", *map(os.path.abspath, args.val)])
    values: Dict[str, Tuple[Any, str]] = {
        "DATASETS.REGISTER_COCO": (entries, "name, annotation file, image folder"),
        "DATASETS.TRAIN": ([entries[0][0]], "--train"),
        "DATASETS.TEST": ([e[0] for e in entries[1:]], "--val" if args.val else "no --val"),
    }
    if base.DATASETS.CATEGORIES:  # of a run on other data
        values["DATASETS.CATEGORIES"] = ([], "categories of the data")
    if args.weights is not None:
        values["MODEL.WEIGHTS"] = (args.weights, "--weights")
    return values


def check(plan: Plan) -> None:
    """Raise a PanetError if the planned config would not train."""
    check_values(plan.cfg)
    cfg = plan.cfg.clone()
    cfg.DATASETS.CHECK_ANNOTATIONS = False  # read_fingerprint has checked them
    setup_datasets(cfg)


def print_reasons(plan: Plan) -> None:
    print("\nkept as in the base:")
    for key, choice in plan.kept.items():
        print(f"  {key} {choice.value}: {choice.reason}")


def outputs(args: argparse.Namespace) -> List[str]:
    """The config, the measurements and the picture."""
    stem = os.path.splitext(args.output)[0]
    # Not STEM.json, which is often the name of an annotation file.
    return [args.output, f"{stem}_plan.json", f"{stem}_plan.png"]


def write(args: argparse.Namespace, plan: Plan, text: str, data: Dict[str, Fingerprint]) -> None:
    with atomic_open(args.output) as f:
        f.write(text)
    content = {
        "fingerprint": {name: d.summary() for name, d in data.items()},
        "objects that some anchor overlaps": {n: plan.prediction(d) for n, d in data.items()},
        "plan": {k: {"value": c.value, "reason": c.reason} for k, c in plan.changed.items()},
        "kept": {k: {"value": c.value, "reason": c.reason} for k, c in plan.kept.items()},
    }
    measured, picture = outputs(args)[1:]
    with atomic_open(measured) as f:
        json.dump(content, f, indent=2)
    plot_plan(plan, data["train"], picture)
    print(f"\nwrote {args.output}, {measured} and {picture}; train with:")
    config_file, gpus = shlex.quote(args.output), max(args.num_gpus, 1)
    print(f"python train_net.py --config-file {config_file} --num-gpus {gpus}")


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    files = {"nargs": 2, "metavar": ("JSON", "FOLDER")}
    parser = argparse.ArgumentParser(description=__doc__)
    files["action"] = "append"
    parser.add_argument("--train", required=True, help="annotation file and image folder", **files)
    parser.add_argument("--val", help="the same for evaluation", **files)
    parser.add_argument("--base", default=BASE, help=f"config to start from; {BASE} by default")
    parser.add_argument("--weights", help="MODEL.WEIGHTS; those of the base by default")
    parser.add_argument("--output", metavar="YAML", help="the config file to write")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no file")
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=0.0,
        help="largest image in training; by default what fits the memory of a GPU, or 0.4 on a CPU",
    )
    here = Hardware.of_this_machine()
    parser.add_argument(
        "--num-gpus", type=int, default=here.gpus, help="those of this machine by default; 0: CPU"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        default=here.gib or 16.0,
        help="memory of each; that of this machine by default, or 16",
    )
    args = parser.parse_args(argv)
    for option in ("train", "val"):
        given = getattr(args, option) or [None]
        if len(given) > 1:
            parser.error(
                f"--{option} takes one dataset; plan for the largest, and add the others to "
                "DATASETS in the config"
            )
        setattr(args, option, given[0])
    if not (args.output or args.dry_run):
        parser.error("give --output, or --dry-run to write nothing")
    if args.output and not args.output.endswith((".yaml", ".yml")):
        parser.error("--output must end in .yaml")
    if not 0 <= args.max_megapixels < 1e4 or not 0 <= args.num_gpus or not args.gpu_memory > 0:
        parser.error("--max-megapixels, --num-gpus and --gpu-memory must be positive")
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    base = read_config(args.base)
    if not args.dry_run:
        inputs = (args.base, args.train[0], *(args.val or ())[:1])
        cli.make_way(outputs(args), inputs)
    hardware = Hardware(args.num_gpus, args.gpu_memory, args.max_megapixels)
    data = {"train": read_fingerprint(*args.train)}
    if args.val:
        data["val"] = read_fingerprint(*args.val, evaluated=True)
        most = int(data["val"].objects_per_image.max(initial=0))
        data["train"] = replace(data["train"], most_at_test=most)
    for name, fingerprint in data.items():
        print(f"{name}: {getattr(args, name)[0]}\n{fingerprint_table(fingerprint)}\n")
    pairs = similar_files(data["train"].files, data["val"].files) if args.val else []
    if pairs:
        print(
            f"{len(pairs)} validation images are named like training images, such as {pairs[0][1]} "
            f"like {pairs[0][0]}; copies would make the evaluation too good.\n"
        )
    plan = make_plan(data["train"], base, hardware, given_values(args, base))
    check(plan)
    tables = [prediction_table(plan, fingerprint, name) for name, fingerprint in data.items()]
    machine = f"{args.num_gpus} GPUs of {args.gpu_memory:.0f} GiB" if args.num_gpus else "a CPU"
    images, objects = len(data["train"].sizes), len(data["train"].boxes)
    header = (
        f"Planned by tools/plan_config.py for {machine} from {images} images with {objects} "
        f"objects.\n{prediction_text(plan, data)}"
    )
    base_path = args.base if PREFIX in args.base else os.path.abspath(args.base)
    text = config_text(plan, base_path, header)
    print("\n\n".join([*tables, text.rstrip()]))
    print_reasons(plan)
    if not args.dry_run:
        write(args, plan, text, data)


def prediction_text(plan: Plan, data: Dict[str, Fingerprint]) -> str:
    """Return the predicted recall, which tools/diagnose.py shows before the proposals."""
    lines = []
    for name, fingerprint in data.items():
        shares = {k: v["IoU 0.5"] for k, v in plan.prediction(fingerprint).items()}
        if shares:
            lines.append(
                f"Some anchor has an IoU of 0.5 with {shares['plan']:.1%} of the objects of "
                f"{name}; with the base, {shares['base']:.1%}."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
