from .box_head import FastRCNNConvFCNormHead
from .mask_head import FCFusionBranch, PANetMaskHead
from .roi_heads import AdaptivePoolingMixin, PANetCascadeROIHeads, PANetROIHeads
from .suppression import Suppression, SuppressionMixin, set_suppression

__all__ = [
    "AdaptivePoolingMixin",
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "Suppression",
    "SuppressionMixin",
    "set_suppression",
]
