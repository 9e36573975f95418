"""The configs of this package, and models made from them, as Detectron2's model zoo has them."""

from .model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
