"""Checkpointers that neither load half a model nor save one."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .._detectron2 import LoadHooks
from ..errors import CheckpointError
from .atomic import AtomicPathManager

__all__ = ["RunCheckpointer", "StrictCheckpointer", "join_names"]

_NAMES_SHOWN = 20


class StrictCheckpointer(LoadHooks):
    """
    A :class:`DetectionCheckpointer` that raises where its parent logs and goes on with layers
    that were not loaded: right for evaluating, predicting and resuming.

    To start a training run some layers must be new; then ``required`` names those that may not.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        required: Optional[Sequence[str]] = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model (nn.Module): the model to load into.
            save_dir (str): see :class:`DetectionCheckpointer`.
            required (list[str] or None): prefixes of the names that the checkpoint must have,
                such as ["backbone.bottom_up."]. None requires every name of the model and no
                other.
            checkpointables: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.required = required
        self._path = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """
        Args:
            path (str): path or URL of a checkpoint, as in ``MODEL.WEIGHTS``.
            args, kwargs: see :meth:`DetectionCheckpointer.load`.

        Returns:
            dict: what the checkpoint holds beside the model.

        Raises:
            CheckpointError: if there is no such file, it cannot be fetched or read, or it does not
                fit.
        """
        if not path:
            raise CheckpointError("MODEL.WEIGHTS is empty; it must name a trained checkpoint.")
        # Detectron2 reads "?matching_heuristics=True" behind the file's name.
        address = urlparse(path)._replace(query="")
        if address.scheme:
            self._fetch(address.geturl())
        elif not self.path_manager.isfile(address.geturl()):
            raise CheckpointError(
                f"there is no file {path!r}, which MODEL.WEIGHTS or, with --resume, "
                "last_checkpoint names."
            )
        self._path = path
        return super().load(path, *args, **kwargs)

    def _fetch(self, address: str) -> None:
        """Where files from afar are kept, the parent will find it."""
        try:
            if not self.path_manager.isfile(self.path_manager.get_local_path(address)):
                raise FileNotFoundError("nothing is known of such addresses")
        except Exception as e:  # each kind of address has its own
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise CheckpointError(
                f"cannot get {address}, which MODEL.WEIGHTS names: {reason}"
            ) from e

    def read_file(self, filename: str) -> Dict[str, Any]:
        try:
            return super().read_file(filename)
        except Exception as e:  # torch, pickle and zipfile each raise their own
            first_line = (str(e) or type(e).__name__).splitlines()[0]
            raise CheckpointError(f"{filename} is not a checkpoint: {first_line}") from e

    def load_weights(self, checkpoint: Dict[str, Any]) -> Any:
        incompatible = super().load_weights(checkpoint)
        found = {
            "missing from it": [n for n in incompatible.missing_keys if self._may_not_miss(n)],
            "in it but not in the model": [
                n for n in incompatible.unexpected_keys if self.required is None and _counts(n)
            ],
            "of another shape": [
                f"{name} (checkpoint {tuple(theirs)}, model {tuple(ours)})"
                for name, theirs, ours in incompatible.incorrect_shapes
                if self._is_required(name)
            ],
        }
        complaints = [f"{len(n)} {what}: {join_names(n)}" for what, n in found.items() if n]
        if complaints:
            raise CheckpointError(
                f"{self._path} does not fit the model of this config. {'; '.join(complaints)}"
            )
        return incompatible

    def _is_required(self, name: str) -> bool:
        return _counts(name) and (self.required is None or name.startswith(tuple(self.required)))

    def _may_not_miss(self, name: str) -> bool:
        # Offsets of a deformable conv are zero at first, and in no classifier.
        is_new = self.required is not None and ".conv2_offset." in name
        return self._is_required(name) and not is_new


def _counts(name: str) -> bool:
    return not name.endswith("num_batches_tracked")  # absent from converted checkpoints


class RunCheckpointer(DetectionCheckpointer):
    """
    A :class:`DetectionCheckpointer` whose files are there as a whole or not at all, whenever the
    process that saves them is killed or the disk is full.
    """

    path_manager: Any

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs: Any):
        """
        Args:
            model, save_dir, kwargs: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = AtomicPathManager(self.path_manager)

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Args:
            name, kwargs: see :class:`DetectionCheckpointer`.

        Raises:
            CheckpointError: if the file cannot be written. The checkpoint before is intact, and
                the one that ``--resume`` continues from.
        """
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as e:
            cause = e.__context__ if isinstance(e.__context__, OSError) else e
            # On a full disk torch's zip writer, inline_container.cc, raises a RuntimeError; so does
            # CUDA for other reasons.
            if not (isinstance(cause, OSError) or "inline_container" in str(e)):
                raise
            raise CheckpointError(
                f"cannot write checkpoint {name}.pth in {self.save_dir}: {cause}. What was saved "
                "before is intact; --resume continues from there."
            ) from e


def join_names(names: Sequence[str], shown: int = _NAMES_SHOWN) -> str:
    """
    Args:
        names (sequence[str]): names of tensors, for an error.
        shown (int): how many of them to write out.

    Returns:
        str: "a, b and 3 more."
    """
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "") + "."
