from .atomic import atomic_open, write_json
from .strict_checkpoint import RunCheckpointer, StrictCheckpointer

__all__ = ["RunCheckpointer", "StrictCheckpointer", "atomic_open", "write_json"]
