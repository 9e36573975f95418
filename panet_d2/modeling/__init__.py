from .backbone import PAFPN, build_resnet_pafpn_backbone, build_retinanet_resnet_pafpn_backbone
from .poolers import AdaptiveROIPooler, adaptive_poolers
from .roi_heads import (
    AdaptivePoolingMixin,
    FastRCNNConvFCNormHead,
    FCFusionBranch,
    PANetCascadeROIHeads,
    PANetMaskHead,
    PANetROIHeads,
    PANetRROIHeads,
)

__all__ = [
    "AdaptivePoolingMixin",
    "AdaptiveROIPooler",
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "PAFPN",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PANetRROIHeads",
    "adaptive_poolers",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
]
