"""
The paper's ablation. Train the rungs from Mask R-CNN to full PANet, and the models of side
questions, with several seeds. Then write the table, with confidence intervals, and the plots. Runs
that have a JSON file are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from statistics import median
from typing import Callable, Dict, List, Optional

from detectron2.modeling import build_model

from experiments.ablation.report import load_results, plot_curves, plot_differences, table
from experiments.ablation.rungs import GROUPS, LADDER, RUNGS, overrides
from experiments.ablation.runner import SPEED_KEYS, Run, pretrained_resnet, run_all
from experiments.benchmark.models import (
    FIXED_COUNTS,
    images,
    imitate_trained,
    model_size,
    set_score_threshold,
)
from experiments.benchmark.tasks import inference, training_step
from experiments.benchmark.timing import interleaved
from panet_d2 import cli
from panet_d2.checkpoint import write_json
from panet_d2.engine import setup_config
from panet_d2.engine.hooks import STOPPED
from panet_d2.errors import DataError

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
RESULTS = "experiments/results/ablation"
DOCUMENT = os.path.join(ROOT, RESULTS, "README.md")
TRAIN_NET = os.path.join(ROOT, "train_net.py")
BASELINES = {
    "dsb2018": os.path.join(ROOT, "configs/DSB2018/mask_rcnn_R_18_FPN_gn.yaml"),
    "facade": os.path.join(ROOT, "configs/Facade/mask_rcnn_R_18_FPN.yaml"),
    "granular": os.path.join(ROOT, "configs/Granular/mask_rcnn_R_18_FPN.yaml"),
    "shapes": os.path.join(ROOT, "configs/Shapes/mask_rcnn_R_18_FPN_gn.yaml"),
}
EVALUATIONS = 6  # points of a run's curve
# For runs that start from a trained ResNet. The same stages are frozen as in Detectron2's configs.
# The schedule is the baseline's best with seed 0.
FINE_TUNING = [
    *("MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.BASE_LR", "0.0012"),
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
]
# A warm-up of a sixth of the documented runs. After a warm-up of 50 steps most units of the heavier
# box head are dead. 64 proposals, as in the config of the shapes, take a quarter off the time of
# Mask R-CNN's step and nearly half off full PANet's.
FINE_TUNING_ON = {
    "shapes": ["SOLVER.WARMUP_ITERS", "500"],
    "dsb2018": ["SOLVER.WARMUP_ITERS", "200", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"],
}
QUICK = {"rungs": ["baseline", list(LADDER)[-1]], "seeds": [1], "steps": 150}


def recorded_opts(results: str, rungs: List[str]) -> Dict[str, List[str]]:
    """Overrides of the runs, for each of the rungs that has runs."""
    runs = {name: seeds for name, seeds in load_results(results).items() if name in rungs}
    recorded = {name: next(iter(seeds.values()))["settings"] for name, seeds in runs.items()}
    unused = ("config", "MODEL.WEIGHTS", *SPEED_KEYS)  # all models are timed with the same format
    return {
        name: [part for k, v in settings.items() if k not in unused for part in (k, v)]
        for name, settings in recorded.items()
    }


def describe_models(config_file: str, opts: Dict[str, List[str]]) -> Dict[str, dict]:
    """Parameters and GFLOPs, for an image of 256 x 256, of each rung."""
    return {
        name: model_size(
            setup_config(config_file, [*of_rung, "MODEL.DEVICE", "cpu"], needed=()), 256, 256
        )
        for name, of_rung in opts.items()
    }


def time_models(config_file: str, opts: Dict[str, List[str]], repeats: int) -> Dict[str, dict]:
    """
    Median seconds of a training step and of an inference, measured for all models in turn. The
    weights are random and all models get the same numbers of proposals and detections.
    """
    models = {}
    for name, of_rung in opts.items():
        cfg = setup_config(config_file, [*of_rung, *FIXED_COUNTS], needed=())
        models[name] = imitate_trained(build_model(cfg))
    inputs = images(cfg.SOLVER.IMS_PER_BATCH, 256, 256, classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    times: Dict[str, dict] = {name: {} for name in opts}

    def measure(key: str, runs: Dict[str, Callable]) -> None:
        for name, seconds in interleaved(runs, cfg.MODEL.DEVICE, repeats, warmup=2).items():
            times[name][key] = median(seconds)

    measure("seconds_per_step", {n: training_step(m, inputs) for n, m in models.items()})
    for model in models.values():  # after training, which changes the statistics of batch norm
        set_score_threshold(model, inputs)
    measure("seconds_per_image", {n: inference(m, inputs[:1]) for n, m in models.items()})
    return times


def report(results: str, models: Dict[str, dict], document: Optional[str]) -> str:
    """
    Draw the plots and write the table into the document, if one is given, between the marks with
    the name of the results' folder. Returns the table.
    """
    runs = load_results(results)
    rows = table(runs, models)
    plot_curves(runs, os.path.join(results, "curves.png"))
    plot_differences(runs, os.path.join(results, "differences.png"))
    if not document:
        return rows
    with open(document, encoding="utf-8") as f:
        text = f.read()
    name = os.path.basename(results)
    marks = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)"
    if not re.search(marks, text, flags=re.S):
        raise DataError(f"{document} has no place between <!-- table {name} --> and <!-- end -->.")
    text = re.sub(marks, lambda m: f"{m[1]}\n{rows}\n{m[2]}", text, flags=re.S)
    with open(document, "w", encoding="utf-8") as f:
        f.write(text)
    return rows


def read_models(results: str) -> Dict[str, dict]:
    """Sizes and times of the rungs that were measured."""
    path = os.path.join(results, "models.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def schedule(steps: int) -> List[str]:
    """Config overrides for ``steps`` steps. The learning rate drops as early as in the configs."""
    drops = [steps * 3 // 4, steps * 37 // 40]
    return ["SOLVER.MAX_ITER", str(steps), "SOLVER.STEPS", str(drops)]


def train(args: argparse.Namespace, config_file: str, results: str) -> List[str]:
    """Train the runs that have no JSON file. Returns a message for each run that failed."""
    opts = [*FINE_TUNING, *FINE_TUNING_ON[args.data]] if args.pretrain else []
    opts += [*(schedule(args.steps) if args.steps else []), *args.opts]
    cfg = setup_config(config_file, opts)
    steps, channels = cfg.SOLVER.MAX_ITER, cfg.MODEL.FPN.OUT_CHANNELS
    period = 0 if args.quick else max(1, steps // EVALUATIONS)
    periods = [("TEST.EVAL_PERIOD", period), ("SOLVER.CHECKPOINT_PERIOD", max(1, steps // 4))]
    opts += [part for k, v in periods if k not in args.opts for part in (k, str(v))]
    work = os.path.join(args.work, os.path.basename(results))
    os.makedirs(results, exist_ok=True)
    resnet_norm = None
    if args.pretrain:
        # The ResNet has batch norm, as those trained on ImageNet have, whatever --norm is.
        resnet_norm = args.norm if args.norm.endswith("BN") else "BN"
        baseline = (*overrides(RUNGS["baseline"]), "MODEL.RESNETS.NORM", resnet_norm)
        # The length is in the name, so that no run starts from a ResNet of another length.
        name = f"pretrain{args.pretrain}"
        run = Run(name, 0, config_file, (*baseline, *args.opts, *schedule(args.pretrain)))
        resnet = pretrained_resnet(run, work, results, TRAIN_NET)
        opts += ["MODEL.WEIGHTS", resnet]
    # Seed by seed: a run that is cut off then leaves complete ladders.
    runs = [
        Run(
            rung,
            seed,
            config_file,
            (*overrides(RUNGS[rung], args.norm, resnet_norm, conv_dim=channels), *opts),
        )
        for seed in args.seeds
        for rung in args.rungs
    ]
    return run_all(runs, work, results, TRAIN_NET, args.jobs)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.ablation", description=__doc__)
    parser.add_argument("--data", choices=list(BASELINES), default="dsb2018")
    parser.add_argument("--config-file", help="another baseline: a Mask R-CNN with a 2fc box head")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=list(GROUPS),
        help="groups of rungs; by default the ladder, with --time all that have runs",
    )
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), help="replaces --groups")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="length of each run; the config's by default")
    parser.add_argument(
        "--pretrain",
        type=int,
        metavar="STEPS",
        help="train a Mask R-CNN for so many steps first, and start all runs from its ResNet",
    )
    parser.add_argument(
        "--norm",
        default="GN",
        help="norm of neck and heads; SyncBN on several GPUs",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--results", help=f"folder of JSON files and plots; {RESULTS}/DATA by default"
    )
    parser.add_argument("--work", default="output/ablation", help="folder of the runs' output")
    parser.add_argument(
        "--document", help=f"file for the table; {RESULTS}/README.md without --results"
    )
    parser.add_argument("--report", action="store_true", help="only write the table and the plots")
    parser.add_argument(
        "--time",
        type=int,
        metavar="REPEATS",
        help="only time the models side by side, on a machine that does nothing else",
    )
    parser.add_argument("--quick", action="store_true", help="two rungs, one seed, in minutes")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="config overrides of all runs, and of --pretrain",
    )
    args = parser.parse_args(argv)
    if args.pretrain and args.data not in FINE_TUNING_ON:
        parser.error(f"--pretrain is for {' and '.join(FINE_TUNING_ON)}; others need a ResNet-18")
    # As an exception, so that the training runs are terminated as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    if args.quick:
        args.data, args.results = "shapes", args.results or "output/ablation/quick"
        for key, value in QUICK.items():
            setattr(args, key, value)
    groups = args.groups or (list(GROUPS) if args.time else ["ladder"])
    args.rungs = args.rungs or [name for group in groups for name in GROUPS[group]]
    document = args.document or (None if args.results else DOCUMENT)
    # The folder's name is also that of its place in the document and of its folder in --work.
    results = os.path.abspath(args.results or os.path.join(ROOT, RESULTS, args.data))
    config_file = args.config_file or BASELINES[args.data]
    models = read_models(results)
    if args.time:
        opts = recorded_opts(results, args.rungs)
        if not opts:
            raise DataError(f"{results} has no runs of {', '.join(args.rungs)} to time.")
        for name, times in time_models(config_file, opts, args.time).items():
            models.setdefault(name, {}).update(times)
    elif not args.report:
        failures = train(args, config_file, results)
        if failures:
            print("\n".join(f"error: {line}" for line in failures), file=sys.stderr)
            return 1
    if not args.report:
        unknown = [name for name in RUNGS if "gflops" not in models.get(name, {})]
        sizes = describe_models(config_file, recorded_opts(results, unknown))
        for name, size in sizes.items():
            models.setdefault(name, {}).update(size)
        write_json(os.path.join(results, "models.json"), models)
    print(report(results, models, document))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
