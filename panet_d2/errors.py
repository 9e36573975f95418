"""What the package's errors for people have in common."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Something that the user can mend. The message says in one sentence what is wrong."""

    def __init__(self, message: str = ""):
        """
        Args:
            message (str): the sentence. A data loader's worker hands on its errors with the whole
                traceback in their text; of that the sentence is kept.
        """
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rpartition(f".{type(self).__name__}: ")[2].rstrip()
        super().__init__(message)
