from .defaults import (
    Predictor,
    latest_checkpoint,
    load_for_inference,
    load_run,
    read_config,
    setup_config,
)
from .launch import EXPECTED_ERRORS, launch
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "EXPECTED_ERRORS",
    "Predictor",
    "Trainer",
    "TrainingDiverged",
    "latest_checkpoint",
    "launch",
    "load_for_inference",
    "load_run",
    "read_config",
    "setup_config",
]
