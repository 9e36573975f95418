#!/usr/bin/env python
"""Copies configs/ into the package that is built. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Put configs/ where an installed ``panet_d2.model_zoo`` finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the configs at the top of the checkout are used
        target = Path(self.build_lib) / "panet_d2/model_zoo/configs"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left others
        shutil.copytree(HERE / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConfigs})
