"""Load checkpoints without running code from the file."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import warnings
import zipfile
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping

import numpy as np
import torch

from ..errors import CheckpointError

# numpy 2 renamed this module. Files name the module of the numpy that wrote them.
_CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
# What a pickle of arrays, tensors and plain containers needs.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    (f"{_CORE}.multiarray", "_reconstruct"),
    (f"{_CORE}.multiarray", "scalar"),
    (f"{_CORE}.numeric", "_frombuffer"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
COMPILED = "_orig_mod."  # in the names of a module that torch.compile returns
# Keys that hold the weights in common layouts, the first one wins.
_LAYOUTS = ("model", "state_dict", "model_state_dict", "ema")


class _NotData:
    """Placeholder for an object whose class is not data. All operations on it are ignored."""

    origin = ""  # the full name of the class
    is_module = False
    dump_patches = False  # read by torch, which would write a patch file if it were True

    def __new__(cls, *args: Any, **kwargs: Any) -> _NotData:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, dict) and "_parameters" in state

    def _ignore(self, *args: Any) -> None:
        pass

    append = extend = add = __setitem__ = _ignore

    def __str__(self) -> str:
        if self.is_module:
            return f"holds a whole module ({self.origin}), not its weights: save its state_dict()"
        return f"asks for {self.origin}, which is not data"


class _DataUnpickler(pickle.Unpickler):
    """An unpickler that never imports a class that is not data."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 stores bytes
            return str.encode
        module = re.sub(r"^numpy\._?core\.", f"{_CORE}.", module)
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        origin = re.sub(r"[^\w.]", "?", f"{module}.{name}")  # could contain terminal codes
        return type("_NotData", (_NotData,), {"origin": origin})


# torch.load takes its unpickler from a module.
_DATA_PICKLE = SimpleNamespace(
    __name__="pickle",
    Unpickler=_DataUnpickler,
    load=lambda file, **kwargs: _DataUnpickler(file, **kwargs).load(),
)


def load_untrusted(path: str) -> Dict[str, Any]:
    """
    Load a checkpoint without running code that the file may contain. A placeholder replaces each
    object whose class is not data, such as mmengine's HistoryBuffer.

    Args:
        path (str): a file of ``torch.save``, a pickle with arrays and plain containers as in
            Detectron2's model zoo, or, with the package safetensors, a ``.safetensors`` file.

    Returns:
        dict: the content.

    Raises:
        CheckpointError: if the file is missing or broken, or holds no dict.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles and old formats
            content = _read(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}.") from None
    except Exception as e:  # pickle, zipfile and torch each raise their own types
        why = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
        raise CheckpointError(f"{path} is not a checkpoint: {why}.") from e
    if isinstance(content, _NotData):
        raise CheckpointError(f"{path} {content}.")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    return dict(content)


def _read(path: str) -> Any:
    with open(path, "rb") as f:
        start = f.read(1024)
        text = start.lstrip().lower()
        if not start:
            raise ValueError("the file is empty")
        if text.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise ValueError("it is a web page; download the file itself")
        if text.startswith(b"version https://git-lfs"):
            raise ValueError("it is a git-lfs pointer; run git lfs pull in its repository")
        # safetensors: the size of the header, then the header in JSON.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path):
            return _read_safetensors(path)
        if start.startswith(b"PK"):
            if not zipfile.is_zipfile(path):
                raise ValueError("its end is missing; copy or download it again")
            if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
                raise ValueError("it is a TorchScript model")
        else:
            f.seek(0)
            content = _DataUnpickler(f, encoding="latin1").load()
            if content != torch.serialization.MAGIC_NUMBER:
                return content
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # something other than the weights is not on torch's list
        pickle_module: Any = _DATA_PICKLE
        return torch.load(path, "cpu", pickle_module, weights_only=False)


def _read_safetensors(path: str) -> Dict[str, torch.Tensor]:
    try:
        library = importlib.import_module("safetensors.torch")
    except ImportError:
        raise ValueError(
            "it is in the safetensors format, which needs the package safetensors"
        ) from None
    return library.load_file(path)


def find_weights(content: Mapping[str, Any], path: str) -> Dict[str, Any]:
    """
    Find the weights in the content of a checkpoint.

    Args:
        content (mapping): from :func:`load_untrusted`. The weights are under "model",
            "state_dict", "model_state_dict" or "ema", or are the content.
        path (str): the file, for the error.

    Returns:
        dict[str, Tensor or np.ndarray]: by name; the object in ``content``.

    Raises:
        CheckpointError: if there are no weights, or a value is neither a tensor nor an array.
    """
    found: List[Any] = [content[key] for key in _LAYOUTS if content.get(key) is not None]
    tensors = [w for w in found if isinstance(w, dict) and any(map(_is_tensor, w.values()))]
    weights = next(iter([*tensors, *found]), content)
    if isinstance(weights, _NotData):
        raise CheckpointError(f"{path} {weights}.")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path} has no weights under 'model' or 'state_dict'.")
    for name, value in weights.items():
        if isinstance(value, _NotData):
            raise CheckpointError(f"{path}: {name!r} {value}.")
        if not isinstance(name, str) or not _is_tensor(value):
            raise CheckpointError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor.")
    return weights


def _is_tensor(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    return is_array or isinstance(value, torch.Tensor)


def unwrapped(weights: Mapping[str, Any]) -> Dict[str, Any]:
    """Return weights by the names in the model alone, as :func:`model_weights` describes."""
    weights = {name.replace(COMPILED, ""): value for name, value in weights.items()}
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def model_weights(content: Mapping[str, Any], path: str) -> Dict[str, torch.Tensor]:
    """
    Take the weights from the content of a checkpoint with :func:`find_weights`.

    Returns:
        dict[str, Tensor]: by name, without the "module." of DistributedDataParallel and the
        "_orig_mod." of torch.compile. Floating-point weights become float32.
    """
    result = {}
    for name, value in unwrapped(find_weights(content, path)).items():
        tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        result[name] = tensor.float() if tensor.is_floating_point() else tensor
    return result


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without terminal codes, or its type's name."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0].rstrip(". ")
