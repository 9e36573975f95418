"""
Makes any Detectron2 program a PANet program: set ``DETECTRON2_ENV_MODULE=panet_d2.env``.

Detectron2 imports the module of this environment variable while it is itself being imported, also
in spawned processes. Importing the package registers its classes; this adds its config keys.
"""

from .config import install as setup_environment

__all__ = ["setup_environment"]
