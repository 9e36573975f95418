"""Register datasets in COCO format from the config, and check them against the config."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import PanopticFPN, SemanticSegmentor
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..categories import forget_names, read_categories, resolve_categories
from ..config import read_choice
from ..errors import ConfigError, DataError
from ..modeling.check_model import finds_oriented_boxes, is_architecture, num_classes_node
from .check import (
    check_sizes,
    forget_images,
    keep_images,
    log_warnings,
    raise_errors,
    read_coco,
)
from .check_annotations import (
    BOX_DIFFERS,
    BOX_EMPTY,
    BOX_OUTSIDE,
    REPEATED,
    check_annotations,
    has_oriented_boxes,
    summary_problems,
)
from .check_cache import CheckedFile, FileState, file_state, is_known_clean, remember_clean
from .check_masks import HOLE

logger = logging.getLogger("panet_d2")

# Fewer annotations are checked in less than a second, so no record is written.
_WORTH_REMEMBERING = 10_000


class _CocoFile(NamedTuple):
    """The content of an annotation file, and its state before it was read."""

    state: Optional[FileState]
    content: dict


def register_coco_file(name: str, json_file: str, image_root: str) -> dict:
    """
    Register a dataset in COCO format. It replaces a dataset of the same name.

    Args:
        name (str): the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file, image_root (str): annotation file and folder of the images. Relative paths start
            at the environment variable ``DETECTRON2_DATASETS``.

    Returns:
        dict: the content of the annotation file.

    Raises:
        DataError: if a file or folder is missing, or the annotation file cannot be used.
    """
    json_file, image_root = find_coco_files(name, json_file, image_root)
    content = read_coco(json_file)
    _register(name, json_file, image_root, content)
    return content


def _sorted_categories(content: dict, json_file: str) -> Tuple[List[dict], dict]:
    """Return the categories by id, and the names of their classes."""
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        return categories, {c["id"]: c["name"] for c in categories}
    except (KeyError, TypeError):
        categories = content["categories"]
        raise_errors(check_annotations({"images": [], "categories": categories}), json_file)
        raise


def _class_metadata(classes: dict) -> dict:
    return {
        "thing_classes": list(classes.values()),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(classes)},
    }


def _read_by_detectron2(name: str) -> bool:
    return str(getattr(DatasetCatalog[name], "__module__", "")).startswith("detectron2.")


def _name_classes(name: str) -> None:
    """
    Name the classes of a dataset of ``register_coco_instances``, as Detectron2 does only when it
    loads the data. Before, nothing can compare their number with the config.
    """
    if name not in DatasetCatalog:
        return
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if not _read_by_detectron2(name) or metadata.get("evaluator_type") != "coco":
        return
    if metadata.get("thing_classes") is None and json_file and PathManager.isfile(json_file):
        metadata.set(**_class_metadata(_sorted_categories(read_coco(json_file), json_file)[1]))


def _register(name: str, json_file: str, image_root: str, content: dict) -> None:
    categories, classes = _sorted_categories(content, json_file)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    oriented = has_oriented_boxes(content)

    def load() -> List[dict]:
        records = load_coco_json(json_file, image_root, name)
        if oriented:
            for annotation in itertools.chain.from_iterable(r["annotations"] for r in records):
                annotation["bbox_mode"] = BoxMode.XYWHA_ABS
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco_rotated" if oriented else "coco",
        **_class_metadata(classes),
        **_keypoint_metadata(categories),
    )


def datasets_folder() -> str:
    """Return the folder that ``DETECTRON2_DATASETS`` names, "datasets" by default."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def find_coco_files(name: str, json_file: str, image_root: str) -> Tuple[str, str]:
    """Return the full paths for :func:`register_coco_file`; raise a DataError if one is missing."""
    base = datasets_folder()
    json_file, image_root = os.path.join(base, json_file), os.path.join(base, image_root)
    hint = f"relative paths start at DETECTRON2_DATASETS, which is {base!r}."
    if not PathManager.isfile(json_file):
        raise DataError(f"dataset {name!r}: there is no annotation file {json_file}; {hint}")
    if not PathManager.isdir(image_root):
        raise DataError(f"dataset {name!r}: there is no image folder {image_root}; {hint}")
    return json_file, image_root


# Paths that Detectron2's own datasets have in their metadata.
_PATHS = (
    "json_file",
    "panoptic_json",
    "image_root",
    "panoptic_root",
    "sem_seg_root",
    "image_dir",
    "gt_dir",
    "dirname",
)


def check_dataset_files(name: str, evaluated: bool = True) -> None:
    """
    Check that the files and folders of a dataset exist.

    Args:
        name (str): a registered dataset. Only datasets that Detectron2 reads are checked.
        evaluated (bool): whether models will be evaluated on the dataset.

    Raises:
        DataError: if a path does not exist.
    """
    if not _read_by_detectron2(name):
        return  # a user's own, which may have other paths in its metadata
    metadata = MetadataCatalog.get(name)
    for key in _PATHS:
        if key.startswith("panoptic") and metadata.get("sem_seg_root"):
            # Training reads instances and stuff from other files.
            if not evaluated or metadata.get("evaluator_type") != "coco_panoptic_seg":
                continue
        path = metadata.get(key)
        if isinstance(path, str) and path and "://" not in path and not PathManager.exists(path):
            hint = "correct the path."
            if not os.path.isabs(path) or path.startswith(os.path.abspath(datasets_folder())):
                hint = (
                    "set DETECTRON2_DATASETS to the folder of the datasets, which is "
                    f"{datasets_folder()!r} now."
                )
            raise DataError(f"dataset {name!r}: {path} does not exist; {hint}")


def coco_entries(cfg: CfgNode) -> List[Tuple[str, str, str]]:
    """Return ``DATASETS.REGISTER_COCO``; raise a ConfigError if it is not a list of triples."""
    entries, wanted = cfg.DATASETS.REGISTER_COCO, "(name, annotation file, image folder)"
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"DATASETS.REGISTER_COCO is {entries!r}; it must be a list of {wanted}.")
    names = set()
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or [type(e) for e in entry] != [str] * 3:
            raise ConfigError(f"DATASETS.REGISTER_COCO has {entry!r}; each entry must be {wanted}.")
        if entry[0] in names:
            raise ConfigError(f"DATASETS.REGISTER_COCO names {entry[0]!r} more than once.")
        names.add(entry[0])
    return [tuple(entry) for entry in entries]


def dataset_names(cfg: CfgNode, split: str) -> Sequence[str]:
    """Return ``DATASETS.TRAIN`` or ``TEST``; raise a ConfigError if it is not a list of names."""
    names = cfg.DATASETS[split]
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"DATASETS.{split} is {names!r}; it must be a list of names.")
    return names


def _keypoint_metadata(categories: List[dict]) -> dict:
    """Return names and flips of the keypoints, from the first category that has keypoints."""
    for category in categories:
        names = category.get("keypoints")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            continue  # check_annotations names it
        if not names:
            continue
        known = {name.lower(): name for name in names}
        pairs = []
        for left in names:
            # left_eye, Left eye, l_eye, eye.L
            right = left.lower().replace("left", "right")
            right = re.sub(r"(?<![a-z])l(?![a-z])", "r", right)
            if right != left.lower() and right in known:
                pairs.append((left, known[right]))
        return {"keypoint_names": names, "keypoint_flip_map": pairs}
    return {}


def setup_datasets(cfg: CfgNode, needed: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """
    Register the datasets of ``DATASETS.REGISTER_COCO``, and check the used datasets.

    Used datasets must match the config. If the number of classes is 0, the number is set from the
    datasets. ``DATASETS.CATEGORIES`` is resolved, see
    :func:`panet_d2.categories.resolve_categories`. All processes of a job must call this
    function.

    Args:
        cfg (CfgNode): a config with :func:`panet_d2.add_panet_config`; changed in place.
        needed (sequence[str]): which of "TRAIN" and "TEST" will be used. Evaluation needs only
            "TEST", prediction neither. Other datasets may be missing.

    Raises:
        ConfigError: if ``DATASETS`` names an unknown dataset, or a dataset does not match the
            config.
        DataError: if a dataset is missing, incomplete or without objects, or
            :func:`panet_d2.data.check_annotations` finds an error.
    """
    used: Dict[str, str] = {}
    for split in ("TRAIN", "TEST"):
        for name in dataset_names(cfg, split):
            if split in needed:
                used.setdefault(name, split)
    check = read_choice(cfg, "DATASETS.CHECK_ANNOTATIONS", (True, False))
    # Only the main process checks the images, and only for training: see check_training_images.
    keep = "TRAIN" in needed and cfg.DATASETS.CHECK_IMAGES is True and comm.is_main_process()
    forget_images()
    forget_names([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    read: Dict[str, _CocoFile] = {}  # by path, because two names may share a file
    files: Dict[str, _CocoFile] = {}
    for name, json_file, image_root in coco_entries(cfg):
        try:
            json_file, image_root = find_coco_files(name, json_file, image_root)
            if json_file not in read:
                state = file_state(json_file)
                read[json_file] = _CocoFile(state, read_coco(json_file))
            _register(name, json_file, image_root, read[json_file].content)
            files[name] = read[json_file]
        except DataError:
            if name in used:
                raise
    for name, split in used.items():
        if name not in DatasetCatalog:
            raise ConfigError(
                f"DATASETS.{split} names {name!r}, which is neither known to Detectron2 nor "
                "listed in DATASETS.REGISTER_COCO."
            )
        if name in files:
            evaluated = name in cfg.DATASETS.TEST and "TEST" in needed
            _check_dataset(cfg, name, files[name], check, split == "TRAIN", evaluated)
            if keep:
                keep_images(name, files[name].content["images"])
            continue
        _name_classes(name)
        if split == "TRAIN" and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
            _check_shapely(cfg, repr(name))
    _check_num_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    resolve_categories(cfg)
    for name in used:
        if name not in files:
            check_dataset_files(name, name in cfg.DATASETS.TEST and "TEST" in needed)


def _check_dataset(
    cfg: CfgNode, name: str, file: _CocoFile, check: bool, trained: bool, evaluated: bool
) -> None:
    """Check a dataset for training, evaluation or both; with ``check``, also each annotation."""
    content, json_file = file.content, MetadataCatalog.get(name).json_file
    annotations = [a for a in content.get("annotations", ()) if isinstance(a, dict)]
    _check_orientation(cfg, name, content, trained)
    keypoints = _num_keypoints(cfg, name, annotations)
    if cfg.MODEL.MASK_ON:
        _check_masks(cfg, json_file, annotations, trained)
    if check:
        masks = bool(cfg.MODEL.MASK_ON)
        _check_in_main_process(name, file, masks, evaluated, keypoints, trained)
    _check_images(name, content)
    raise_errors(check_sizes(cfg, content, trained, evaluated), json_file)
    if trained:
        if is_architecture(cfg, PanopticFPN, SemanticSegmentor):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which trains on "
                f"semantic labels, but dataset {name!r} of DATASETS.REGISTER_COCO has none; "
                "register it with Detectron2's register_coco_panoptic_separated, or set another "
                "architecture."
            )
        if all(a.get("iscrowd", 0) for a in annotations):
            crowds = "; all have iscrowd 1" if annotations else ""
            raise DataError(f"{json_file} has no annotations to train on{crowds}.")
        _warn_of_flips(cfg, name)


def _check_in_main_process(name: str, file: _CocoFile, *args: Any) -> None:
    """Run :func:`_check_once` in the main process; all processes of the job raise its error."""
    error: Optional[DataError] = None
    try:
        if comm.is_main_process():
            _check_once(name, file, *args)
    except DataError as e:
        error = e
    # Otherwise the processes that wait here would report a lost connection.
    error = comm.all_gather(error)[0]
    if error is not None:
        raise error


def _check_once(
    name: str, file: _CocoFile, masks: bool, evaluated: bool, keypoints: int, trained: bool
) -> None:
    """Check annotations, unless an earlier check found no error."""
    metadata = MetadataCatalog.get(name)
    log_warnings(summary_problems(file.content, evaluated, trained), metadata.json_file)
    checked = file.state and CheckedFile(file.state, masks, evaluated, keypoints)
    if checked and is_known_clean(checked):
        return
    number = len(file.content.get("annotations", ()))
    logger.info(f"Checking the {number} annotations of {name!r} (DATASETS.CHECK_ANNOTATIONS) …")
    # Not checked here: whether there are objects to train on, which known files need too.
    problems = check_annotations(file.content, masks, evaluated, keypoints, False)
    raise_errors(problems, metadata.json_file, metadata.image_root)
    logged = (BOX_DIFFERS, BOX_EMPTY, BOX_OUTSIDE, REPEATED, HOLE)
    log_warnings([p for p in problems if p.what in logged], metadata.json_file)
    if checked and number >= _WORTH_REMEMBERING:
        remember_clean(checked)


def _check_images(name: str, content: dict) -> None:
    root = MetadataCatalog.get(name).image_root
    images = [i for i in content["images"] if isinstance(i, dict)]
    named = [i["file_name"] for i in images if isinstance(i.get("file_name"), str)]
    files = [os.path.join(root, file_name) for file_name in named]
    missing = [f for f in files if not PathManager.isfile(f)]
    if missing:
        raise DataError(
            f"dataset {name!r}: {len(missing)} of {len(files)} images are missing, the first is "
            f"{missing[0]}."
        )


def _check_orientation(cfg: CfgNode, name: str, content: dict, trained: bool) -> None:
    """Raise a ConfigError if the dataset has oriented boxes and the model upright ones, or so."""
    oriented = MetadataCatalog.get(name).evaluator_type == "coco_rotated"
    if content.get("annotations") and oriented != finds_oriented_boxes(cfg):
        theirs, wanted = ("oriented", "'RRPN'") if oriented else ("upright", "'RPN'")
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r}, but dataset "
            f"{name!r} has {theirs} boxes (of {5 if oriented else 4} numbers), for which it must "
            f"be {wanted}; configs/DOTA has examples."
        )
    if oriented and trained and cfg.INPUT.CROP.ENABLED:
        raise ConfigError(
            f"INPUT.CROP.ENABLED is True; it must be False for dataset {name!r}, because "
            "Detectron2 cannot crop oriented boxes."
        )
    if oriented and trained and cfg.INPUT.RANDOM_FLIP == "vertical":
        raise ConfigError(
            f"INPUT.RANDOM_FLIP is 'vertical'; it must be 'horizontal' or 'none' for dataset "
            f"{name!r}, because Detectron2 cannot flip oriented boxes vertically."
        )


def _check_masks(cfg: CfgNode, json_file: str, annotations: List[dict], trained: bool) -> None:
    if trained:
        annotations = [a for a in annotations if not a.get("iscrowd", 0)]
    masks = [a["segmentation"] for a in annotations if a.get("segmentation")]
    if annotations and not masks:
        raise DataError(
            f"{json_file} has no masks; MODEL.MASK_ON must be False to use its boxes alone."
        )
    if not trained:
        return
    if cfg.INPUT.MASK_FORMAT == "polygon" and any(isinstance(m, dict) for m in masks):
        raise ConfigError(
            f"INPUT.MASK_FORMAT is 'polygon', but {json_file} has masks in RLE; it must be "
            "'bitmask'."
        )
    if any(isinstance(m, list) for m in masks):
        _check_shapely(cfg, json_file)


def _check_shapely(cfg: CfgNode, polygons: str) -> None:
    """Raise a ConfigError if ``polygons``, the name of a dataset or file, cannot be cropped."""
    if cfg.INPUT.CROP.ENABLED and importlib.util.find_spec("shapely") is None:
        raise ConfigError(
            f"INPUT.CROP.ENABLED is True, and {polygons} has polygon masks, which need the package "
            "shapely to be cropped, with any INPUT.MASK_FORMAT; run pip install shapely, or set "
            "INPUT.CROP.ENABLED to False."
        )


def _num_keypoints(cfg: CfgNode, name: str, annotations: List[dict]) -> int:
    """Return the number of keypoints that each object must have; 0 if keypoints are not used."""
    if not cfg.MODEL.KEYPOINT_ON or not annotations:
        return 0
    metadata = MetadataCatalog.get(name)
    if not any(a.get("keypoints") for a in annotations):
        raise DataError(f"{metadata.json_file} has no keypoints; MODEL.KEYPOINT_ON must be False.")
    names = metadata.get("keypoint_names")
    if not names:
        raise DataError(
            f"{metadata.json_file} has keypoints, but none of its categories names them in a list "
            "'keypoints'."
        )
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(names) != number:
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but dataset {name!r} has "
            f"{len(names)} keypoints; it must be {len(names)}."
        )
    return number


def _warn_of_flips(cfg: CfgNode, name: str) -> None:
    flipped = cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "horizontal"
    if flipped and not MetadataCatalog.get(name).get("keypoint_flip_map"):
        logger.warning(
            "No two keypoints of dataset %r are named as a left and right pair, so "
            "INPUT.RANDOM_FLIP exchanges no keypoints.",
            name,
        )


def _check_num_classes(cfg: CfgNode, names: Iterable[str]) -> None:
    node_name = num_classes_node(cfg)
    if node_name is None:
        return
    node, key = cfg.MODEL[node_name], f"MODEL.{node_name}.NUM_CLASSES"
    classes = _known_classes(names)
    if classes and node.NUM_CLASSES == 0:
        node.NUM_CLASSES = len(next(iter(classes.values())))
    _compare_classes(classes, key, node.NUM_CLASSES, ", or 0 to take it from the data")
    kept = read_categories(cfg)
    if kept and not classes:
        node.NUM_CLASSES = node.NUM_CLASSES or len(kept)
        if node.NUM_CLASSES != len(kept):
            raise ConfigError(
                f"{key} is {node.NUM_CLASSES}, but DATASETS.CATEGORIES has {len(kept)} classes; "
                "both must be those of the model's dataset."
            )
    if node.NUM_CLASSES < 1:
        raise ConfigError(
            f"{key} is {node.NUM_CLASSES}; it must be at least 1, or 0 if DATASETS names a dataset "
            "with known classes (the thing_classes of its metadata)."
        )


def check_num_classes(key: str, number: int, names: Iterable[str]) -> None:
    """
    Compare a number of classes with datasets, as :func:`setup_datasets` does for a YAML config.

    Args:
        key (str): the key of the number.
        number (int): the model's number of classes.
        names (iterable[str]): the datasets. Those whose classes are not known are skipped.

    Raises:
        ConfigError: if a dataset has another number of classes, or two have other classes.
    """
    names = list(names)
    for name in names:
        _name_classes(name)
    _compare_classes(_known_classes(names), key, number)


def _known_classes(names: Iterable[str]) -> Dict[str, Tuple[str, ...]]:
    return {
        name: tuple(MetadataCatalog.get(name).thing_classes)
        for name in names
        if hasattr(MetadataCatalog.get(name), "thing_classes")
    }


def _compare_classes(
    classes: Dict[str, Tuple[str, ...]], key: str, number: int, alternative: str = ""
) -> None:
    for name, known in classes.items():
        if number != len(known):
            raise ConfigError(
                f"{key} is {number}, but dataset {name!r} has {len(known)} classes; {key} must be "
                f"{len(known)}{alternative}."
            )
    _check_class_names(classes)


def _check_class_names(classes: Dict[str, Tuple[str, ...]]) -> None:
    """Raise a ConfigError if a class number means different things in two datasets."""
    if not classes:
        return
    first, expected = next(iter(classes.items()))
    for name, known in classes.items():
        for number, (ours, theirs) in enumerate(zip(expected, known), 1):
            if len(known) > 1 and ours != theirs:  # a single class cannot be mistaken for another
                raise ConfigError(
                    f"DATASETS: class {number} is {ours!r} in {first!r}, but {theirs!r} in "
                    f"{name!r}; all must have the same classes, in the order of their ids."
                )
