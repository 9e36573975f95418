from .linear import Linear
from .multilevel_roi_align import FUSIONS, fuse_levels, multilevel_roi_align

__all__ = ["FUSIONS", "Linear", "fuse_levels", "multilevel_roi_align"]
