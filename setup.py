#!/usr/bin/env python
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "panet_d2/__init__.py").read_text()).group(1)


class BuildWithConfigs(build_py):
    """Puts configs/ into the package that is built, where panet_d2.model_zoo finds them."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / "panet_d2/model_zoo/configs"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have had others
        shutil.copytree(HERE / "configs", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="panet_d2",
    version=VERSION,
    description="PANet (Liu et al., CVPR 2018) for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["panet_d2", "panet_d2.*"]),
    package_data={"panet_d2": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.9",
    # Detectron2 itself is not on the package index; the README says how to install it.
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "fvcore>=0.1.5.post20220512",
        "pycocotools>=2.0.7",
        "opencv-python>=4.5",
        "numpy>=1.21",
    ],
    extras_require={
        "ablation": ["scipy"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.17"],
        "dev": [
            *("hypothesis>=6", "pytest>=7", "pytest-xdist", "ruff", "scipy"),
            *("onnx>=1.16", "onnxruntime>=1.17"),
        ],
    },
)
