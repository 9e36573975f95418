"""PANet (Liu et al., CVPR 2018) for Detectron2. Importing it registers everything."""

from . import data  # noqa: F401  (registers the embedded dataset)
from .config import add_panet_config
from .errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    PanetError,
    TrainingDiverged,
)
from .modeling import (
    PAFPN,
    AdaptiveROIPooler,
    PANetCascadeROIHeads,
    PANetMaskHead,
    PANetROIHeads,
)

__version__ = "0.2.0"

__all__ = [
    "AdaptiveROIPooler",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "PAFPN",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PanetError",
    "TrainingDiverged",
    "add_panet_config",
]
