from .box_head import FastRCNNConvFCNormHead
from .mask_head import FCFusionBranch, PANetMaskHead
from .roi_heads import AdaptivePoolingMixin, PANetCascadeROIHeads, PANetROIHeads, PANetRROIHeads
from .suppression import Suppression, SuppressionMixin, set_suppression

__all__ = [
    "AdaptivePoolingMixin",
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PANetRROIHeads",
    "Suppression",
    "SuppressionMixin",
    "set_suppression",
]
