from .box_head import FastRCNNConvFCNormHead
from .mask_head import FCFusionBranch, PANetMaskHead
from .roi_heads import PANetCascadeROIHeads, PANetROIHeads

__all__ = [
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
]
