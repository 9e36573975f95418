from .atomic import atomic_open
from .strict_checkpoint import CheckpointError, RunCheckpointer, StrictCheckpointer

__all__ = ["CheckpointError", "RunCheckpointer", "StrictCheckpointer", "atomic_open"]
