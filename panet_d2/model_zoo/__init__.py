"""Configs of this package and models built from them, with the API of Detectron2's model zoo."""

from .model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
