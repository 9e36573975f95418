"""The hardware that a config is planned for, and what fits into its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

# Assumed memory to train a PANet with ResNet-50 and FPN, per megapixel, in mixed precision. Deeper
# ResNets are assumed to take twice as much.
GIB_PER_MEGAPIXEL = 2.0
_GIB_OF_MODEL = 2.0  # weights, momentum, CUDA itself
_USABLE = 0.9
_IMAGES_PER_GPU = 2  # the budget of pixels leaves room for this many
CPU_MEGAPIXELS = 0.4  # 632 x 632 pixels; a step with larger images takes minutes
CPU_BATCH = 4


@dataclass(frozen=True)
class Hardware:
    """
    Attributes:
        gpus (int): number of GPUs; 0 for the CPU.
        gib (float): memory of a GPU in GiB.
        max_megapixels (float): size of the largest training image in megapixels; 0 for the largest
            that fits.
    """

    gpus: int = 0
    gib: float = 0.0
    max_megapixels: float = 0.0

    @classmethod
    def of_this_machine(cls) -> Hardware:
        """Return the GPUs of this machine, or its CPU."""
        gpus = torch.cuda.device_count()
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else 0.0
        return cls(gpus, gib)

    def megapixels(self, cfg: CfgNode) -> float:
        """Return the budget of pixels of an image in training, in megapixels."""
        if self.max_megapixels:
            return self.max_megapixels
        return self._fitting(cfg) / _IMAGES_PER_GPU if self.gpus else CPU_MEGAPIXELS

    def budget_source(self, cfg: CfgNode) -> str:
        """Return a clause that gives the budget of pixels and its source."""
        budget = f"the budget is {self.megapixels(cfg):.2g} megapixels"
        if self.max_megapixels:
            return f"{budget} (--max-megapixels)"
        if self.gpus:
            return f"{budget} ({_IMAGES_PER_GPU} images in {self.gib:.0f} GiB)"
        return f"{budget} (the default on a CPU)"

    def batch(self, cfg: CfgNode) -> int:
        """Return the number of images per step: the base config's, or fewer if memory is short."""
        wanted = cfg.SOLVER.IMS_PER_BATCH
        if not self.gpus:
            return min(wanted, CPU_BATCH)
        pixels = max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN / 1e6
        fits = max(int(self._fitting(cfg) / pixels), 1) if pixels else 1
        each = max(wanted // self.gpus, 1)
        return self.gpus * (each if each <= fits else 2 ** int(math.log2(fits)))

    def _fitting(self, cfg: CfgNode) -> float:
        """Return how many megapixels of training images fit on a GPU."""
        deep = 2 if cfg.MODEL.RESNETS.DEPTH > 50 else 1
        return max(_USABLE * self.gib - _GIB_OF_MODEL, 0.5) / (deep * GIB_PER_MEGAPIXEL)
