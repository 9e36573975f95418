"""Errors that a user can fix. Each message is one sentence that names the key or the file."""

from __future__ import annotations


class PanetError(Exception):
    """Base of all errors that a user can fix."""

    def __init__(self, message: str = ""):
        """
        Args:
            message (str): the sentence. A data loader's worker adds its traceback to the message;
                only the sentence is kept.
        """
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rpartition(f".{type(self).__name__}: ")[2].rstrip()
        super().__init__(message)


class ConfigError(PanetError, ValueError):
    """A config value that cannot work. The message names the key and what it accepts."""


class DataError(PanetError, ValueError):
    """A dataset, image or other input that cannot be used. The message names the file."""


class CheckpointError(PanetError, ValueError):
    """A checkpoint that cannot be used for this model. The message says why."""


class ExportError(PanetError, RuntimeError):
    """A model that cannot be exported, or whose export differs from the model."""


class TrainingDiverged(PanetError, FloatingPointError):
    """A loss is NaN or infinite. The message has the step, the losses and the images."""
