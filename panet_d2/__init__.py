"""PANet (Liu et al., CVPR 2018) for Detectron2. Importing it registers everything."""

from . import data  # noqa: F401  (registers the embedded data set)
from .config import ConfigError, add_panet_config
from .modeling import (
    PAFPN,
    AdaptiveROIPooler,
    PANetCascadeROIHeads,
    PANetMaskHead,
    PANetROIHeads,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveROIPooler",
    "ConfigError",
    "PAFPN",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "add_panet_config",
]
