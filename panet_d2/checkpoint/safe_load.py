"""Safe reading of checkpoints from strangers: no code in the file is run."""

from __future__ import annotations

import pickle
import re
from typing import Any, Dict, Mapping

import numpy as np
import torch

from ..errors import CheckpointError
from .strict_checkpoint import first_line

# numpy 2 renamed this module. Files name the module of the numpy that wrote them.
_CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
# What a pickle of arrays and plain containers needs.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    (f"{_CORE}.multiarray", "_reconstruct"),
    (f"{_CORE}.multiarray", "scalar"),
    (f"{_CORE}.numeric", "_frombuffer"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 stores bytes
            return str.encode
        module = re.sub(r"^numpy\._?core\.", f"{_CORE}.", module)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not data")
        return super().find_class(module, name)


def load_untrusted(path: str) -> Dict[str, Any]:
    """
    Load a checkpoint without running code that it may contain.

    Args:
        path (str): a ``.pkl`` file of Detectron2's model zoo, which holds arrays and plain
            containers, or any other file that torch loads with ``weights_only``.

    Returns:
        dict: the content.

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
        raise CheckpointError(
            f"{path} is not a checkpoint that can be loaded safely: {first_line(e)}"
        ) from e
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    return dict(content)


def model_weights(content: Mapping[str, Any], path: str) -> Dict[str, torch.Tensor]:
    """
    Take the weights from the content of a checkpoint.

    Args:
        content (mapping): from :func:`load_untrusted`. The weights are under "model" or
            "state_dict", or are the content.
        path (str): the file, for the error.

    Returns:
        dict[str, Tensor]: by name. Floating-point weights become float32.

    Raises:
        CheckpointError: if there are no weights, or a value is not a tensor.
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
