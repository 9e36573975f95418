"""
Time PANet and Mask R-CNN: stock Mask R-CNN, PANet as a plain loop over levels, and this package's
PANet, in turn in one process. Write a JSON file, tables in Markdown and a plot.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from statistics import median
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode

from experiments.benchmark.models import (
    HEADS,
    build_models,
    images,
    model_size,
    part_times,
    set_score_threshold,
)
from experiments.benchmark.op import benchmark_op
from experiments.benchmark.report import describe_machine, markdown, plot
from experiments.benchmark.tasks import inference, training_step
from experiments.benchmark.timing import interleaved, peak_memory
from panet_d2 import cli
from panet_d2.checkpoint import atomic_open, write_json
from panet_d2.engine import setup_config

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "configs")
COCO = os.path.join(CONFIGS, "COCO-InstanceSegmentation")
LADDER = sorted(glob.glob(os.path.join(COCO, "ablations", "[0-9]_*.yaml")))


def benchmark_models(cfg: CfgNode, head: str, args: argparse.Namespace) -> Dict:
    """Time and memory of inference and of a training step, and time of inference by part."""
    height, width = args.size
    device, amp = cfg.MODEL.DEVICE, args.amp
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    single, batch = (images(n, height, width, classes=classes) for n in (1, args.batch))
    models = build_models(cfg, head)
    for model in models.values():
        set_score_threshold(model, single)
    result: Dict = {"seconds": {}, "bytes": {}, "parts": {}}
    tasks = {
        "inference, batch 1": lambda m: inference(m, single, amp),
        f"inference, batch {args.batch}": lambda m: inference(
            m, batch, amp
        ),  # the same if batch is 1
        f"training step, batch {args.batch}": lambda m: training_step(m, batch, amp),
    }
    for what, task in tasks.items():
        runs = {name: task(model) for name, model in models.items()}
        times = interleaved(runs, device, args.repeats, args.warmup)
        result["seconds"][what] = {name: median(t) for name, t in times.items()}
        result["bytes"][f"peak memory, {what}"] = {
            name: peak_memory(run, device) for name, run in runs.items()
        }
        for model in models.values():
            model.zero_grad(set_to_none=True)
        print(f"{head}: {what}: {result['seconds'][what]}", flush=True)
    for name, model in models.items():
        run = inference(model, single, amp)
        run()
        with part_times(model, device) as times:
            for _ in range(args.repeats):
                run()
        result["parts"][name] = {p: s / args.repeats for p, s in times.seconds.items()}
        result.setdefault("detections", {})[name] = len(run()[0]["instances"])
    return result


def benchmark_ladder(config_files: Sequence[str], size: Tuple[int, int]) -> List[Dict]:
    """GFLOPs, for one image, and parameters of each rung of the paper's ladder."""
    rows = []
    for config_file in config_files:
        cfg = setup_config(config_file, ["MODEL.DEVICE", "cpu"], needed=())
        rung = os.path.splitext(os.path.basename(config_file))[0]
        rows.append({"rung": rung, **model_size(cfg, *size)})
        print(rows[-1], flush=True)
    return rows


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
    parser.add_argument(
        "--config-file",
        default=os.path.join(COCO, "panet_R_50_FPN_1x.yaml"),
        help="config of a PANet without norms in its heads",
    )
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--name", help="name of the result files; cpu or cuda by default")
    parser.add_argument("--heads", nargs="*", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1088), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, help="batch size; 8 on a GPU, 2 on a CPU")
    parser.add_argument("--repeats", type=int, help="timed rounds; 30 on a GPU, 7 on a CPU")
    parser.add_argument("--warmup", type=int, help="rounds before; 10 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--boxes",
        nargs="*",
        type=int,
        default=[100, 300, 1000, 2000],
        help="numbers of boxes for RoIAlign",
    )
    parser.add_argument(
        "--no-ladder", action="store_true", help="do not count the FLOPs of the ladder"
    )
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="fp16 autocast; the default on a GPU"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    args = parser.parse_args(argv)
    cfg = setup_config(args.config_file, args.opts, needed=())
    device = cfg.MODEL.DEVICE
    on_gpu = device.startswith("cuda")
    for key, gpu, cpu in (("batch", 8, 2), ("repeats", 30, 7), ("warmup", 10, 1)):
        if getattr(args, key) is None:
            setattr(args, key, gpu if on_gpu else cpu)
    args.amp = on_gpu if args.amp is None else args.amp

    dtype = torch.float16 if args.amp else torch.float32
    results: Dict = {
        "machine": describe_machine(device),
        "settings": {
            "config": os.path.relpath(args.config_file, CONFIGS),
            "image": f"{args.size[0]}x{args.size[1]}",
            "precision": "fp16 autocast" if args.amp else "fp32",
            "median of": args.repeats,
        },
        "models": {head: benchmark_models(cfg, head, args) for head in args.heads},
    }
    fusions = ["max", None, "sum", "mean"]
    if args.boxes:
        results["op"] = benchmark_op(args.boxes, fusions, dtype, device, args.repeats)
    if not args.no_ladder:
        results["ladder"] = benchmark_ladder(LADDER, args.size)

    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, args.name or ("cuda" if on_gpu else "cpu"))
    write_json(f"{path}.json", results)
    with atomic_open(f"{path}.md") as f:
        f.write(markdown(results))
    plot(results, f"{path}.png")
    print(markdown(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
