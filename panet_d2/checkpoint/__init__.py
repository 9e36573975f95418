from .strict_checkpoint import CheckpointError, StrictCheckpointer

__all__ = ["CheckpointError", "StrictCheckpointer"]
