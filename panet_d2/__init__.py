"""PANet (Liu et al., CVPR 2018) for Detectron2. Importing it registers everything."""

# First: where DETECTRON2_ENV_MODULE is panet_d2.env, importing Detectron2 imports panet_d2.config.
import detectron2  # noqa: F401

from . import data  # noqa: F401  (registers the embedded dataset)
from .config import add_panet_config, install
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
    AdaptivePoolingMixin,
    AdaptiveROIPooler,
    PANetCascadeROIHeads,
    PANetMaskHead,
    PANetROIHeads,
    PANetRROIHeads,
)

__version__ = "0.2.0"

__all__ = [
    "AdaptivePoolingMixin",
    "AdaptiveROIPooler",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "PAFPN",
    "PANetCascadeROIHeads",
    "PANetMaskHead",
    "PANetROIHeads",
    "PANetRROIHeads",
    "PanetError",
    "TrainingDiverged",
    "add_panet_config",
    "install",
]
