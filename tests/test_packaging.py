"""What `pip install .` installs, built from a source distribution as a user would get it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

import panet_d2

from .common import ROOT

CONFIGS = sorted(
    str(f.relative_to(ROOT / "configs"))
    for f in (ROOT / "configs").rglob("*")
    if f.suffix in (".py", ".yaml")
)
# What a source distribution is made from. Not the checkout itself: building leaves files in it.
FILES = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"]
FILES += ["pyproject.toml", "setup.py", "train_net.py"]
FOLDERS = ["configs", "demo", "panet_d2", "requirements", "tests", "tools"]

USE = """
from pathlib import Path
import panet_d2
from panet_d2 import model_zoo

names = {names!r}
inside = Path(panet_d2.__file__).parent / "model_zoo/configs"
assert str(inside).startswith({root!r}), inside
for name in names:
    assert Path(model_zoo.get_config_file(name)) == inside / name, name
assert model_zoo.get_config("COCO-InstanceSegmentation/panet_R_50_FPN_1x.py").train.max_iter
cfg = model_zoo.get_config("COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml")
assert cfg.MODEL.ROI_BOX_HEAD.AFP.ENABLED
model = model_zoo.get("Shapes/panet_R_18_FPN_gn.yaml", device="cpu")
print(type(model.roi_heads).__name__)
"""


def run(*command, cwd, **env):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setuptools(hook, target, cwd):
    """Build as pip does, without a network."""
    run("-c", f"from setuptools import build_meta; build_meta.{hook}({str(target)!r})", cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    setuptools("build_sdist", folder, cwd=checkout)
    name = f"panet_d2-{panet_d2.__version__}"
    shutil.unpack_archive(folder / f"{name}.tar.gz", folder)
    return folder / name


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The unpacked wheel that is made from the source distribution."""
    # What an earlier build in the same place has left.
    stale = source / "build/lib/panet_d2/model_zoo/configs/stale.yaml"
    stale.parent.mkdir(parents=True)
    stale.touch()
    folder = tmp_path_factory.mktemp("installed")
    setuptools("build_wheel", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")
    return folder / "site"


def files_in(folder):
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", FOLDERS)
def test_source_distribution_is_complete(source, name):
    suffixes = (".py", ".yaml", ".txt", ".typed")
    expected = {f for f in files_in(ROOT / name) if f.endswith(suffixes)}
    assert expected and expected <= files_in(source / name)


def test_wheel_has_the_package_alone(installed):
    top = {f.name for f in installed.iterdir()}
    assert top == {"panet_d2", f"panet_d2-{panet_d2.__version__}.dist-info"}
    assert (installed / "panet_d2/py.typed").is_file()


def test_wheel_has_every_config(installed):
    assert len(CONFIGS) > 40
    assert files_in(installed / "panet_d2/model_zoo/configs") == set(CONFIGS)


def test_model_zoo_reads_what_is_installed(installed, tmp_path):
    use = USE.format(names=CONFIGS, root=str(installed))
    printed = run("-c", use, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.strip().splitlines()[-1] == "PANetROIHeads"


def test_version_is_the_packages(installed):
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev)\d+)?", panet_d2.__version__)
    # Read by setup.py, which does not import the package.
    metadata = installed / f"panet_d2-{panet_d2.__version__}.dist-info/METADATA"
    assert f"\nVersion: {panet_d2.__version__}\n" in metadata.read_text()
