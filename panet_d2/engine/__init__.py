from .defaults import (
    Predictor,
    Trainer,
    latest_checkpoint,
    load_for_inference,
    setup_config,
)

__all__ = [
    "Predictor",
    "Trainer",
    "latest_checkpoint",
    "load_for_inference",
    "setup_config",
]
