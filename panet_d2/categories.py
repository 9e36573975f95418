"""Ids and names of the categories, which a run keeps in its config and checkpoints."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, Iterable, List, Optional, Set, Tuple, Union

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .errors import ConfigError

Categories = List[
    Tuple[Union[int, str], str]
]  # (dataset's id, name) of each class, in the model's order

# Names of datasets that are not registered and whose metadata comes from a config.
_from_config: Set[str] = set()


class _Replaceable(Metadata):
    """Metadata from a config, in which a program may still replace names and ids."""

    def __setattr__(self, key: str, value: Any) -> None:
        if key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            self.__dict__.pop(key, None)  # the parent rejects another value
            _from_config.discard(self.name)
        super().__setattr__(key, value)


def as_categories(value: Any) -> Optional[Categories]:
    """Return a list of (id, name), or None if ``value`` is not one."""
    if not isinstance(value, (list, tuple)):
        return None
    for item in value:
        kinds = [type(part) for part in item] if isinstance(item, (list, tuple)) else []
        if kinds not in ([int, str], [str, str]):
            return None
    return [(item[0], item[1]) for item in value]


def read_categories(cfg: CfgNode) -> Categories:
    """Return ``DATASETS.CATEGORIES``; raise a ConfigError if it is not a list of (id, name)."""
    value = cfg.DATASETS.get("CATEGORIES", ())  # Detectron2's own configs lack this key
    categories = as_categories(value)
    if categories is None:
        found = f"is {value!r}"
        if isinstance(value, (list, tuple)):
            found = f"has {next(item for item in value if as_categories([item]) is None)!r}"
        raise ConfigError(
            f"DATASETS.CATEGORIES {found}; it must be a list of [id, name], a whole number or "
            "text, and a text."
        )
    if len({category_id for category_id, _ in categories}) < len(categories):
        raise ConfigError("DATASETS.CATEGORIES has an id twice; each class must have its own.")
    return categories


def dataset_categories(name: str) -> Categories:
    """Return the categories in a dataset's metadata, or [] without names or usable ids."""
    metadata = MetadataCatalog.get(name)
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
    ids = {number: _as_int(category_id) for category_id, number in numbers.items()}
    # Detectron2 keeps no ids of LVIS's categories. The ids count from 1.
    first = 1 if metadata.get("evaluator_type") == "lvis" else 0
    names = metadata.get("thing_classes", [])
    categories: List[Any] = [[ids.get(i, i + first), str(name)] for i, name in enumerate(names)]
    # Detectron2's "things" of some panoptic datasets include stuff, which has other ids.
    unique = len({str(category_id) for category_id, _ in categories}) == len(categories)
    return as_categories(categories if unique else []) or []


def resolve_categories(cfg: CfgNode) -> None:
    """
    Set ``DATASETS.CATEGORIES`` from the first dataset of ``DATASETS.TEST`` and ``TRAIN`` that has
    class names. If none has names, add the names in the key to the metadata of these datasets.

    Args:
        cfg (CfgNode): changed in place.

    Raises:
        ConfigError: if the key is not a list of (id, name), or does not match the dataset's
            classes.
    """
    kept = read_categories(cfg)
    names = list(dict.fromkeys((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)))
    forget_names(names)
    known = {name: dataset_categories(name) for name in names}
    name = next((name for name in names if known[name]), None)
    if name is not None:
        for number, (ours, theirs) in enumerate(zip(kept, known[name]), 1):
            # A single class cannot be mistaken for another.
            if ours[1] != theirs[1] and len(kept) > 1:
                raise ConfigError(
                    f"DATASETS.CATEGORIES: class {number} is {ours[1]!r}, but in dataset {name!r} "
                    f"it is {theirs[1]!r}; use a dataset with the model's classes, or set the key "
                    "to [] to train on the dataset's classes."
                )
        if kept and len(kept) != len(known[name]):
            raise ConfigError(
                f"DATASETS.CATEGORIES has {len(kept)} classes, but dataset {name!r} has "
                f"{len(known[name])}; set the key to [] to take the classes from the dataset."
            )
        cfg.DATASETS.CATEGORIES = [list(category) for category in known[name]]
    name_datasets(cfg)


def name_datasets(cfg: CfgNode, num_classes: Optional[int] = None) -> None:
    """
    Copy the names and ids of ``DATASETS.CATEGORIES`` to the metadata of the datasets in
    ``DATASETS.TEST`` and ``TRAIN``. Datasets that are registered or have names are skipped.

    Args:
        cfg (CfgNode): any Detectron2 config.
        num_classes (int or None): the model's number of classes. If ``DATASETS.CATEGORIES`` has
            another number, no names are copied.

    Raises:
        ConfigError: if the key is not a list of (id, name).
    """
    kept = read_categories(cfg)
    if num_classes not in (None, len(kept)):
        kept = []
    names = {*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN}
    forget_names(names)
    for name in names:
        if (
            kept
            and name not in DatasetCatalog
            and not MetadataCatalog.get(name).get("thing_classes")
        ):
            metadata = MetadataCatalog.get(name)
            metadata.set(**_metadata(kept))
            # The class of metadata has its own __setattr__.
            object.__setattr__(metadata, "__class__", _Replaceable)
            _from_config.add(name)


def forget_names(names: Iterable[str]) -> None:
    """Drop the metadata of these datasets that :func:`name_datasets` took from a config."""
    for name in _from_config.intersection(names):
        _from_config.remove(name)
        if name not in DatasetCatalog:  # the dataset may have been registered since
            MetadataCatalog.pop(name, None)


def model_metadata(cfg: CfgNode) -> Metadata:
    """
    Return the metadata for a model's output. Call :func:`resolve_categories` first. The class names
    are those of the first dataset of ``DATASETS.TEST`` and ``TRAIN`` that has names, else those of
    ``DATASETS.CATEGORIES``.
    """
    known = [MetadataCatalog.get(name) for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)]
    first = next((metadata for metadata in known if metadata.get("thing_classes")), None)
    if first is not None:
        return first
    fields = known[0].as_dict() if known else {}
    return Metadata(**{**fields, **_metadata(read_categories(cfg))})


def _as_int(value: Any) -> Any:
    """Convert a whole number, such as numpy's or 1.0, to int; return anything else unchanged."""
    if isinstance(value, Integral):
        return int(value)
    return int(float(value)) if isinstance(value, Real) and float(value).is_integer() else value


def _metadata(categories: Categories) -> dict:
    if not categories:
        return {}
    return {
        "thing_classes": [name for _, name in categories],
        "thing_dataset_id_to_contiguous_id": {c: i for i, (c, _) in enumerate(categories)},
    }
