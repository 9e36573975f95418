from .anchor_generator import DetectronAnchorGenerator
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
    Suppression,
    SuppressionMixin,
    set_suppression,
)
from .test_time_augmentation import RCNNWithTTA, check_test_aug
from .tta_mapper import MapperTTA, Rotate90Transform

__all__ = [
    "AdaptivePoolingMixin",
    "AdaptiveROIPooler",
    "DetectronAnchorGenerator",
    "FCFusionBranch",
    "FastRCNNConvFCNormHead",
    "MapperTTA",
    "PAFPN",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PANetRROIHeads",
    "RCNNWithTTA",
    "Rotate90Transform",
    "Suppression",
    "SuppressionMixin",
    "adaptive_poolers",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "check_test_aug",
    "set_suppression",
]
