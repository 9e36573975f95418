from .defaults import (
    Predictor,
    latest_checkpoint,
    load_run,
    load_strict,
    read_config,
    setup_config,
)
from .launch import launch
from .trainer import Trainer

__all__ = [
    "Predictor",
    "Trainer",
    "latest_checkpoint",
    "launch",
    "load_strict",
    "load_run",
    "read_config",
    "setup_config",
]
