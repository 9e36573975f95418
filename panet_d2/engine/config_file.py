"""Config files in YAML, which may start from the configs of this package."""

from __future__ import annotations

import os
from typing import Any, Dict

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError
from ..model_zoo import get_config_file

PREFIX = "panet_d2://"


def find_config_file(path: str) -> str:
    """
    Return the path of a config file.

    Args:
        path (str): a path, or ``panet_d2://`` and a name as in
            :func:`panet_d2.model_zoo.get_config_file`.

    Raises:
        ConfigError: if there is no such file.
    """
    _, prefix, name = path.rpartition(PREFIX)
    if prefix:
        try:
            return get_config_file(name)
        except RuntimeError as e:
            raise ConfigError(f"{PREFIX}{name}: {e}") from None
    if PathManager.isdir(path):
        example = os.path.join(path, "config.yaml")
        raise ConfigError(f"{path} is a folder; give a file, such as {example}.")
    if not PathManager.isfile(path):
        raise ConfigError(
            f"{path} does not exist; for a config of this package, write {PREFIX} before its name, "
            f"such as {PREFIX}COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml."
        )
    return path


class ConfigFile(CfgNode):
    """A config file, read as in Detectron2. ``_BASE_`` may also name a config of this package."""

    @classmethod
    def _open_cfg(cls, filename: str) -> Any:
        return PathManager.open(filename, "rb")  # bytes, so that any locale reads UTF-8

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Dict[str, Any]:
        """
        Args:
            filename (str): see :func:`find_config_file`.
            allow_unsafe (bool): allow Python tags, which Detectron2's own RetinaNet configs use.

        Raises:
            ConfigError: if the file is missing or empty, holds no keys, or holds a key twice.
        """
        filename = find_config_file(filename)
        with cls._open_cfg(filename) as f:
            node = yaml.compose(f, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise ConfigError(f"{filename} has no config keys.")
        _refuse_duplicates(node, filename)
        return super().load_yaml_with_base(filename, allow_unsafe)


def _refuse_duplicates(node: yaml.MappingNode, filename: str, prefix: str = "") -> None:
    """Raise a ConfigError if a key occurs twice. YAML would ignore the first value."""
    seen = set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in seen:
            line = key.start_mark.line + 1
            raise ConfigError(f"{filename}, line {line}: {name} occurs a second time; merge both.")
        seen.add(name)
        if isinstance(value, yaml.MappingNode):
            _refuse_duplicates(value, filename, f"{name}.")


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """
    Merge a config file into a config, in place.

    Args:
        cfg (CfgNode): the config.
        path (str): see :func:`find_config_file`.

    Raises:
        ConfigError: if the file cannot be used.
    """
    try:
        content = ConfigFile.load_yaml_with_base(path, allow_unsafe=True)
    except RecursionError:
        raise ConfigError(f"{path}: _BASE_ leads back to a file that it starts from.") from None
    version = content.get("VERSION", cfg.VERSION)
    if version != cfg.VERSION:
        raise ConfigError(f"{path}: VERSION is {version!r}; it must be {cfg.VERSION}.")
    cfg.merge_from_other_cfg(CfgNode(content))
