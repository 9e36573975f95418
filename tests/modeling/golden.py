"""The recorded modules of the authors' release, by the names that ours give the same weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(
    os.environ.get("PANET_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

needs_golden = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"recorded values of the authors' release are not at {FOLDER} (set PANET_GOLDEN)",
)


def load(name: str) -> tuple[dict, dict, dict]:
    """Returns the weights, inputs and outputs of one recorded module."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        groups: tuple[dict, dict, dict] = ({}, {}, {})
        for key in arrays.files:
            kind, _, rest = key.partition("/")
            groups["w in out".split().index(kind)][rest] = torch.from_numpy(arrays[key])
    return groups


def neck_name(name: str) -> str:
    """One weight of the release's neck, with and without norm, as PAFPN calls it."""
    module, rest = name.split(".", 1)
    if module == "conv_top":
        prefix = "fpn_lateral5"
    else:
        index, rest = rest.split(".", 1)
        rest = rest.removeprefix("conv_lateral.")
        # The FPN lists begin with the coarsest level, the bottom-up lists with N2 -> N3.
        prefix = {
            "topdown_lateral_modules": f"fpn_lateral{4 - int(index)}",
            "posthoc_modules": f"fpn_output{5 - int(index)}",
            "panet_buttomup_conv1_modules": f"pafpn_downsample{3 + int(index)}",
            "panet_buttomup_conv2_modules": f"pafpn_output{3 + int(index)}",
        }[module]
    return f"{prefix}.{conv_norm_name(rest)}"


def conv_norm_name(rest: str) -> str:
    """`0.weight` is the layer's, `1.weight` the norm's; without a norm there is no index."""
    return rest.removeprefix("0.").replace("1.", "norm.")
