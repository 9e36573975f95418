from .box_head import FastRCNNConvFCNormHead
from .mask_head import FCFusionBranch, PANetMaskHead
from .roi_heads import AdaptivePoolingMixin, PANetCascadeROIHeads, PANetROIHeads, PANetRROIHeads

__all__ = [
    "AdaptivePoolingMixin",
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PANetRROIHeads",
]
