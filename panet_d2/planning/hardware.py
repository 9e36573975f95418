"""The hardware that a config is planned for, and what fits into its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

# Assumptions. Training a ResNet-50 with FPN takes about this much for each megapixel, in mixed
# precision, PANet's additional poolings included; with deeper ResNets twice that.
GIB_PER_MEGAPIXEL = 2.0
_GIB_OF_MODEL = 2.0  # weights, momentum, CUDA itself
_USABLE = 0.9
_IMAGES_PER_GPU = 2  # the fewest that the budget of pixels is planned for
CPU_MEGAPIXELS = 0.4  # an image of 632 x 632; larger ones take minutes for a step
CPU_BATCH = 4


@dataclass(frozen=True)
class Hardware:
    """
    Attributes:
        gpus (int): number of GPUs; 0 for the CPU.
        gib (float): memory of a GPU in GiB.
        max_megapixels (float): the largest image in training, in megapixels; 0 for what fits.
    """

    gpus: int = 0
    gib: float = 0.0
    max_megapixels: float = 0.0

    @classmethod
    def of_this_machine(cls, max_megapixels: float = 0.0) -> Hardware:
        """Return the GPUs of this machine, or its CPU."""
        gpus = torch.cuda.device_count()
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else 0.0
        return cls(gpus, gib, max_megapixels)

    def megapixels(self, cfg: CfgNode) -> float:
        """Return the budget of pixels of an image in training, in megapixels."""
        if self.max_megapixels:
            return self.max_megapixels
        return self._fitting(cfg) / _IMAGES_PER_GPU if self.gpus else CPU_MEGAPIXELS

    def budget_source(self, cfg: CfgNode) -> str:
        """Return a clause about the budget of pixels and where it comes from."""
        budget = f"the budget is {self.megapixels(cfg):.2g} megapixels"
        if self.max_megapixels:
            return f"{budget} (--max-megapixels)"
        if self.gpus:
            return f"{budget} ({_IMAGES_PER_GPU} images in {self.gib:.0f} GiB)"
        return f"{budget} (the default on a CPU)"

    def batch(self, cfg: CfgNode) -> int:
        """Return the number of images per step: the base's, or fewer if these do not fit."""
        wanted = cfg.SOLVER.IMS_PER_BATCH
        if not self.gpus:
            return min(wanted, CPU_BATCH)
        pixels = max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN / 1e6
        fits = max(int(self._fitting(cfg) / pixels), 1) if pixels else 1
        each = max(wanted // self.gpus, 1)
        return self.gpus * (each if each <= fits else 2 ** int(math.log2(fits)))

    def _fitting(self, cfg: CfgNode) -> float:
        """The megapixels of all images of a GPU's batch."""
        deep = 2 if cfg.MODEL.RESNETS.DEPTH > 50 else 1
        return max(_USABLE * self.gib - _GIB_OF_MODEL, 0.5) / (deep * GIB_PER_MEGAPIXEL)
