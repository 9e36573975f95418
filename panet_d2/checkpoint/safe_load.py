"""Reading checkpoints of strangers: they can hold numbers, and nothing that runs."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, Dict, Mapping, Tuple

import numpy as np
import torch

from ..errors import CheckpointError

__all__ = ["load_untrusted", "model_weights"]

# What a pickle of arrays and plain containers needs. numpy moved its modules in version 2, and
# files written with either must load with either.
_ALLOWED: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): None,
}
for _core in ("numpy.core", "numpy._core"):
    for _name in ("_reconstruct", "scalar"):
        _ALLOWED[f"{_core}.multiarray", _name] = None
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = None
_ALLOWED["numpy", "ndarray"] = np.ndarray
_ALLOWED["numpy", "dtype"] = np.dtype


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")
        known = _ALLOWED[module, name]
        if known is not None:
            return known
        if module == "_codecs":  # how protocol 2 stores bytes
            return _encode
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            module = module.replace("numpy._core", "numpy.core")
        else:
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, which is not data")
    return text.encode("latin1")


def load_untrusted(path: str) -> Dict[str, Any]:
    """
    Load a checkpoint without running any code that it may contain.

    Args:
        path (str): a ``.pkl`` of Detectron2's model zoo (arrays and plain containers alone), or
            any other file as a checkpoint of torch (``weights_only``).

    Returns:
        dict: what it holds.

    Raises:
        CheckpointError: if the file is missing or broken, wants to run code, or holds no dict.
    """
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as f:
                content = _ArrayUnpickler(f, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}.") from None
    except Exception as e:  # pickle, zipfile and torch each raise their own
        first_line = (str(e) or type(e).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a checkpoint that can be loaded safely: {first_line}"
        ) from e
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    return dict(content)


def model_weights(content: Mapping[str, Any], path: str) -> Dict[str, torch.Tensor]:
    """
    The weights among what a checkpoint holds.

    Args:
        content (mapping): from :func:`load_untrusted`; the weights stand under "model" or
            "state_dict", or are the whole of it.
        path (str): the file, for the error.

    Returns:
        dict[str, Tensor]: by name; double and half precision become float32.

    Raises:
        CheckpointError: if there is something else among them.
    """
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{path} has no weights under 'model' or 'state_dict'.")
    result = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value.copy())
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor.")
        result[name] = value.float() if value.is_floating_point() else value
    return result
