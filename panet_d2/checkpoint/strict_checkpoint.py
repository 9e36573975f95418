"""Checkpointers that raise an error if a model is loaded or saved only in part."""

from __future__ import annotations

import logging
from typing import Any, Dict, Optional, Sequence, Tuple
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from .._detectron2 import LoadHooks, forget_address
from ..errors import CheckpointError
from ..modeling.roi_heads.other_layers import drop_other_layers
from .atomic import AtomicPathManager
from .safe_load import COMPILED, find_weights, first_line, load_untrusted, unwrapped

logger = logging.getLogger("panet_d2")


class StrictCheckpointer(LoadHooks):
    """
    A :class:`DetectionCheckpointer` that raises an error where its parent logs that layers were
    not loaded. Use it to evaluate, predict and resume, or to start training with ``required``.
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
            required (list[str] or None): prefixes of the names that the checkpoint must have, such
                as ["backbone.bottom_up."]. None requires exactly the names of the model.
            save_dir, checkpointables: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.required = required
        self._path = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """
        Load a checkpoint.

        Args:
            path (str): path or URL of the checkpoint, as in ``MODEL.WEIGHTS``.
            args, kwargs: see :meth:`DetectionCheckpointer.load`.

        Returns:
            dict: the rest of the checkpoint's content.

        Raises:
            CheckpointError: if the file is missing, cannot be downloaded or read, or does not match
                the model.
        """
        if not path:
            raise CheckpointError("MODEL.WEIGHTS is empty; it must name a trained checkpoint.")
        # Detectron2 reads "?matching_heuristics=True" after the name of the file.
        address = urlparse(path)._replace(query="").geturl()
        try:
            if not self.path_manager.isfile(self.path_manager.get_local_path(address)):
                raise FileNotFoundError("no such file")
        except Exception as e:  # each kind of address raises its own type
            raise CheckpointError(
                f"cannot get {address!r}, which MODEL.WEIGHTS or, with --resume, last_checkpoint "
                f"names: {first_line(e)}"
            ) from e
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            forget_address(self)

    def read_file(self, filename: str) -> Dict[str, Any]:
        if not filename.endswith(".pkl"):
            try:
                return super().read_file(filename)
            except CheckpointError:
                raise
            except Exception as e:  # e.g. a pycls file, which Detectron2 reads
                raise CheckpointError(f"{filename} is not a checkpoint: {first_line(e)}.") from e
        content = load_untrusted(filename)
        weights = find_weights(
            {"model": content["blobs"]} if "blobs" in content else content, filename
        )
        if "blobs" in content or weights is content:  # Caffe2
            weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        return {**content, "model": weights}

    def read_torch_file(self, filename: str) -> Dict[str, Any]:
        content = load_untrusted(filename)
        weights = find_weights(content, filename)
        return weights if weights is content else {**content, "model": weights}

    def load_weights(self, checkpoint: Dict[str, Any]) -> Any:
        # torch.compile adds to the names of a module, before or after it was saved.
        ours = {name.replace(COMPILED, ""): name for name in self.model.state_dict()}
        weights = {
            ours.get(name, name): value for name, value in unwrapped(checkpoint["model"]).items()
        }
        checkpoint["model"] = weights
        self._check_pixels(weights)
        if self.required is not None:
            drop_other_layers(weights, self.model.state_dict())
            return self._load_checked(checkpoint)
        # On the CPU, because the memory of a GPU may not have room for it.
        before = {n: v.to("cpu", copy=True) for n, v in self.model.state_dict().items()}
        try:
            return self._load_checked(checkpoint)
        except Exception:
            self.model.load_state_dict(before)  # of a program that goes on
            raise

    def _check_pixels(self, weights: Dict[str, Any]) -> None:
        """Compare, and remove, mean and deviation of the pixels, which old checkpoints have."""
        for name in ("pixel_mean", "pixel_std"):
            theirs, ours = weights.pop(name, None), getattr(self.model, name, None)
            if theirs is None or not isinstance(ours, torch.Tensor):
                continue
            theirs = [round(float(v), 3) for v in torch.as_tensor(theirs).flatten()]
            ours = [round(float(v), 3) for v in ours.flatten()]
            if len(theirs) == len(ours) and np.allclose(theirs, ours, atol=2e-3):
                continue
            if self.required is None:
                raise CheckpointError(
                    f"{self._path} has {name} {theirs}, but the model {ours}; set "
                    f"MODEL.{name.upper()} to the checkpoint's."
                )
            logger.warning(
                "%s has %s %s, but the model %s; training has to adapt.",
                *(self._path, name, theirs, ours),
            )

    def _load_checked(self, checkpoint: Dict[str, Any]) -> Any:
        incompatible = super().load_weights(checkpoint)
        prefixes = ("",) if self.required is None else tuple(self.required)

        def is_required(name: str) -> bool:
            # Converted checkpoints have no num_batches_tracked.
            return name.startswith(prefixes) and not name.endswith("num_batches_tracked")

        missing = [n for n in incompatible.missing_keys if is_required(n)]
        unexpected = [n for n in incompatible.unexpected_keys if is_required(n)]
        if self.required is not None:
            # The offsets of deformable convs start at zero. Classifiers do not have them.
            missing = [n for n in missing if ".conv2_offset." not in n]
            unexpected = []
        shapes = [row for row in incompatible.incorrect_shapes if is_required(row[0])]
        check_fit(self._path, missing, unexpected, shapes)
        return incompatible


class RunCheckpointer(DetectionCheckpointer):
    """
    A :class:`DetectionCheckpointer` that writes files atomically. After a killed process or a full
    disk, the previous checkpoint is intact.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        categories: Sequence[Sequence[Any]] = (),
        **kwargs: Any,
    ):
        """
        Args:
            model, save_dir, kwargs: see :class:`DetectionCheckpointer`.
            categories (list): as ``DATASETS.CATEGORIES``; saved beside the weights.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = AtomicPathManager(PathManager)
        self.categories = [list(category) for category in categories]

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Save a checkpoint.

        Args:
            name, kwargs: see :class:`DetectionCheckpointer`.

        Raises:
            CheckpointError: if the file cannot be written. The previous checkpoint is intact, and
                ``--resume`` continues from there.
        """
        try:
            super().save(name, categories=self.categories, **kwargs)
        except (OSError, RuntimeError) as e:
            cause = e.__context__ if isinstance(e.__context__, OSError) else e
            # On a full disk, torch's zip writer (inline_container.cc) raises a RuntimeError. Other
            # RuntimeErrors, such as CUDA's, keep their type.
            if not (isinstance(cause, OSError) or "inline_container" in str(e)):
                raise
            raise CheckpointError(
                f"cannot write checkpoint {name}.pth in {self.save_dir}: {cause}; the previous "
                "checkpoint is intact, and --resume continues from there."
            ) from e


def check_fit(
    checkpoint: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Sequence[Tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """
    Raise a CheckpointError that names what does not match, if anything does not.

    Args:
        checkpoint (str): the checkpoint, for the message.
        missing, unexpected (list[str]): names that only the model or only the checkpoint has.
        shapes (list[tuple]): names with their shapes in the checkpoint and in the model.
    """
    found = {
        "not in the checkpoint": missing,
        "not in the model": unexpected,
        "of another shape": [
            f"{name} (checkpoint {tuple(theirs)}, model {tuple(ours)})"
            for name, theirs, ours in shapes
            if theirs != ours
        ],
    }
    complaints = [f"{len(n)} {what}: {join_names(n)}" for what, n in found.items() if n]
    if complaints:
        raise CheckpointError(
            f"{checkpoint} does not match the model of this config (another architecture or number "
            f"of classes): {'; '.join(complaints)}."
        )


def join_names(names: Sequence[str]) -> str:
    """Join up to 20 names for an error: "a, b and 3 more"."""
    rest = len(names) - 20
    return ", ".join(names[:20]) + (f" and {rest} more" if rest > 0 else "")
