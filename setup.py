#!/usr/bin/env python
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "panet_d2/__init__.py").read_text()).group(1)

setup(
    name="panet_d2",
    version=VERSION,
    description="PANet (Liu et al., CVPR 2018) for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["panet_d2", "panet_d2.*"]),
    python_requires=">=3.9",
    # Detectron2 itself is not on the package index; the README says how to install it.
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "fvcore>=0.1.5.post20220512",
        "pycocotools>=2.0.2",
        "opencv-python>=4.5",
        "numpy>=1.21",
    ],
    extras_require={
        "ablation": ["scipy"],
        "dev": ["pytest>=7", "pytest-xdist", "ruff", "scipy"],
    },
)
