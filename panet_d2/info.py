"""What runs here, for a bug report: ``python -m panet_d2.info``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import import_module
from typing import Dict, List, Optional

import detectron2
import numpy
import torch
import torchvision
from detectron2.utils.collect_env import collect_env_info
from tabulate import tabulate

from . import __version__
from .layers.multilevel_roi_align import implementation

__all__ = ["ENVIRONMENT", "collect_info", "main"]

# Every environment variable that the package reads, but for those that torchrun sets.
ENVIRONMENT = (
    "DETECTRON2_DATASETS",
    "PANET_D2_CACHE",
    "PANET_D2_DEBUG",
    "PANET_D2_ROI_ALIGN",
)


def collect_info() -> Dict[str, Optional[str]]:
    """
    Returns:
        dict[str, str or None]: versions; each device with the RoIAlign that adaptive feature
        pooling has there ("triton", "cpu" or "reference", see
        :func:`panet_d2.layers.multilevel_roi_align`); and the environment variables that the
        package reads, None where they are not set.
    """
    info: Dict[str, Optional[str]] = {
        "panet_d2": __version__,
        "Detectron2": detectron2.__version__,
        "Detectron2's compiled ops": _find("detectron2._C"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Triton": _find("triton"),
        "numpy": numpy.__version__,
        "Python": platform.python_version(),
    }
    devices = {
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {major}.{minor}"
    for device, name in devices.items():
        info[device] = name
        # As the models have it: in float32 (half precision goes the same way), two samples.
        info[f"RoIAlign on {device}"] = implementation([torch.zeros(1, 1, 1, 1).to(device)], 2)
    info.update((f"${variable}", os.environ.get(variable)) for variable in ENVIRONMENT)
    return info


def _find(module: str) -> str:
    """The version of a module that may be missing, or why it is."""
    try:
        return getattr(import_module(module), "__version__", "yes")
    except ImportError as e:
        return f"no: {e}"


def main(argv: Optional[List[str]] = None) -> None:
    """
    Print :func:`collect_info`, and what Detectron2 collects itself.

    Args:
        argv (list[str] or None): the command line, without the program.
    """
    parser = argparse.ArgumentParser(prog="python -m panet_d2.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="panet_d2's own part, as JSON")
    args = parser.parse_args(argv)
    info = collect_info()
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        print(tabulate((name, "not set" if v is None else v) for name, v in info.items()))
        print(collect_env_info())


if __name__ == "__main__":
    main()
