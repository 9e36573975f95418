from .defaults import (
    latest_checkpoint,
    load_strict,
    read_config,
    setup_config,
)
from .launch import launch
from .predictor import Predictor, load_run, run_folder, use_run_weights
from .trainer import Trainer

__all__ = [
    "Predictor",
    "Trainer",
    "latest_checkpoint",
    "launch",
    "load_strict",
    "load_run",
    "read_config",
    "run_folder",
    "setup_config",
    "use_run_weights",
]
