"""Print versions, devices and settings for a bug report: ``python -m panet_d2.info``."""

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

# Every environment variable that the package reads, except those that torchrun sets.
ENVIRONMENT = ("DETECTRON2_DATASETS", "PANET_D2_CACHE", "PANET_D2_DEBUG", "PANET_D2_ROI_ALIGN")


def collect_info() -> Dict[str, Optional[str]]:
    """
    Return versions, each device and its RoIAlign ("triton", "cpu" or "reference"), and the
    variables in :data:`ENVIRONMENT`, None if they are not set.
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
    cpu = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{cpu}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {major}.{minor}"
    for device, name in devices.items():
        info[device] = name
        # For float32 and a sampling ratio of 2, as in the configs. Half precision gives the same.
        info[f"RoIAlign on {device}"] = implementation([torch.zeros(1, 1, 1, 1).to(device)], 2)
    info.update((f"${variable}", os.environ.get(variable)) for variable in ENVIRONMENT)
    return info


def _find(module: str) -> str:
    """Return a module's version, or why it cannot be imported."""
    try:
        return getattr(import_module(module), "__version__", "yes")
    except ImportError as e:
        return f"no: {e}"


def main(argv: Optional[List[str]] = None) -> None:
    """Print :func:`collect_info` and Detectron2's report."""
    parser = argparse.ArgumentParser(prog="python -m panet_d2.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="panet_d2's part as JSON")
    if parser.parse_args(argv).json:
        print(json.dumps(collect_info(), indent=2))
    else:
        rows = [(name, "not set" if v is None else v) for name, v in collect_info().items()]
        print(tabulate(rows), collect_env_info(), sep="\n")


if __name__ == "__main__":
    main()
