"""Print versions, devices and settings for a bug report: ``python -m panet_d2.info``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import import_module
from typing import Dict, List, Optional

import detectron2
import numpy
import torch
import torchvision
from detectron2.utils.collect_env import collect_env_info
from tabulate import tabulate

from . import __version__, cli
from .layers.multilevel_roi_align import implementation, roi_align_choice
from .layers.roi_align_check import DTYPES, triton_failure

# Every environment variable that the package reads, except those that torchrun sets.
ENVIRONMENT = ("DETECTRON2_DATASETS", "PANET_D2_CACHE", "PANET_D2_DEBUG", "PANET_D2_ROI_ALIGN")


def collect_info() -> Dict[str, Optional[str]]:
    """
    Collect versions, devices, the RoIAlign of each device and the variables in :data:`ENVIRONMENT`.

    Returns:
        dict[str, str or None]: by name. A RoIAlign is "triton", "cpu" or "reference", with the
        reason if the Triton kernels fail their check. A variable that is not set is None.

    Raises:
        ConfigError: if the value of ``PANET_D2_ROI_ALIGN`` is unknown.
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
        chosen = _roi_align(torch.zeros(1, 1, 1, 1).to(device))
        # On the CPU, the RoIAlign does not depend on the type.
        by_type = ", ".join(f"{dtype}: {how}" for dtype, how in chosen.items())
        info[f"RoIAlign on {device}"] = chosen["float32"] if device == "cpu" else by_type
    info.update((f"${variable}", os.environ.get(variable)) for variable in ENVIRONMENT)
    return info


def _roi_align(feature: torch.Tensor) -> Dict[str, str]:
    """Return the RoIAlign that runs on a feature map's device, by type."""
    chosen = {}
    for dtype in DTYPES:
        name = str(dtype).replace("torch.", "")
        chosen[name] = implementation([feature.type(dtype)], 2)  # the configs' sampling ratio
        if chosen[name] == "reference" and roi_align_choice() == "auto":
            chosen[name] += f" ({triton_failure(feature.device, dtype)})"
    return chosen


def _find(module: str) -> str:
    """Return a module's version, or why it cannot be imported."""
    try:
        return getattr(import_module(module), "__version__", "yes")
    except ImportError as e:
        return f"no: {e}"


def _print(as_json: bool) -> None:
    info = collect_info()
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        rows = [(name, "not set" if v is None else v) for name, v in info.items()]
        print(tabulate(rows), collect_env_info(), sep="\n")


def main(argv: Optional[List[str]] = None) -> int:
    """Print :func:`collect_info` and Detectron2's report; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m panet_d2.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="panet_d2's part as JSON")
    return cli.run(_print, parser.parse_args(argv).json)


if __name__ == "__main__":
    sys.exit(main())
