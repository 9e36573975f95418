from .levelwise import LevelwiseConv2d, LevelwiseLinear
from .linear import Linear
from .multilevel_roi_align import FUSIONS, fuse_levels, multilevel_roi_align, roi_align_choice
from .nms import box_voting, soft_nms

__all__ = [
    "FUSIONS",
    "LevelwiseConv2d",
    "LevelwiseLinear",
    "Linear",
    "box_voting",
    "fuse_levels",
    "multilevel_roi_align",
    "roi_align_choice",
    "soft_nms",
]
