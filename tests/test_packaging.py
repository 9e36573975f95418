"""What `pip install .` installs, built from a source distribution as a user would get it."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys

import detectron2
import pytest
import yaml

import panet_d2

from .common import ROOT, child_env

CONFIGS = sorted(
    str(f.relative_to(ROOT / "configs"))
    for f in (ROOT / "configs").rglob("*")
    if f.suffix in (".py", ".yaml")
)
# What a source distribution is made from. Not the checkout itself: building leaves files in it.
FILES = ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile"]
FILES += ["README.md", "mkdocs.yml", "pyproject.toml", "setup.py", "train_net.py"]
FILES += [".pre-commit-config.yaml"]
FOLDERS = ["configs", "datasets", "demo", "docs", "experiments", "panet_d2", "requirements"]
FOLDERS += ["tests", "tools"]
SCRIPTS = {
    "panet-d2-info": "panet_d2.info:main",
    "panet-d2-train": "panet_d2.engine.main:main",
}

USE = """
from pathlib import Path
import detectron2
import panet_d2
from panet_d2 import model_zoo

assert detectron2.__file__ == {detectron2!r}, detectron2.__file__
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


def run(*command, cwd, path):
    """What a Python prints that imports from ``path``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env=child_env(path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setuptools(hook, target, cwd):
    """Build as pip does: without a network, and where torch and Detectron2 cannot be imported."""
    block = "import sys; sys.modules['torch'] = sys.modules['detectron2'] = None"
    build = f"from setuptools import build_meta; build_meta.{hook}({str(target)!r})"
    run("-c", f"{block}; {build}", cwd=cwd, path=cwd)


def files_in(folder):
    """Names relative to the folder, without what Python and editors leave there."""
    files = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    return {str(f) for f in files if not any(p.startswith((".", "__pycache__")) for p in f.parts)}


def sources(name):
    """The files of one of the checkout's folders."""
    if name == "datasets":
        # The data that lies beside them may be large.
        return {f.name for f in (ROOT / name).glob("*.py")}
    return files_in(ROOT / name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in FOLDERS:
        for file in sources(name):
            (checkout / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name / file, checkout / name / file)
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


@pytest.fixture(scope="module")
def metadata(installed):
    """The wheel's folder of metadata."""
    return installed / f"panet_d2-{panet_d2.__version__}.dist-info"


@pytest.mark.parametrize("name", FOLDERS)
def test_source_distribution_is_complete(source, name):
    expected = sources(name)
    assert expected and expected <= files_in(source / name)


def test_source_distribution_has_the_files_at_the_top(source):
    assert set(FILES) <= {f.name for f in source.iterdir()}


def test_wheel_has_the_package_and_the_configs_alone(installed, metadata):
    assert {f.name for f in installed.iterdir()} == {"panet_d2", metadata.name}
    package = {f for f in sources("panet_d2") if not f.startswith("model_zoo/configs/")}
    configs = {f"model_zoo/configs/{name}" for name in CONFIGS}
    assert "py.typed" in package
    assert files_in(installed / "panet_d2") == package | configs


def test_wheel_has_every_config(installed):
    assert len(CONFIGS) > 40
    assert files_in(installed / "panet_d2/model_zoo/configs") == set(CONFIGS)


def test_model_zoo_reads_what_is_installed(installed, tmp_path):
    use = USE.format(names=CONFIGS, root=str(installed), detectron2=detectron2.__file__)
    printed = run("-c", use, cwd=tmp_path, path=installed)
    assert printed.strip().splitlines()[-1] == "PANetROIHeads"


def test_version_is_the_packages(metadata):
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev)\d+)?", panet_d2.__version__)
    assert f"\nVersion: {panet_d2.__version__}\n" in (metadata / "METADATA").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == panet_d2.__version__


def test_console_scripts(installed, metadata, tmp_path):
    entry_points = configparser.ConfigParser()
    entry_points.read(metadata / "entry_points.txt")
    assert {name: dict(entry_points[name]) for name in entry_points.sections()} == {
        "console_scripts": SCRIPTS
    }
    called = "import contextlib\n"
    for script in SCRIPTS.values():
        module, function = script.split(":")
        called += f"import {module} as m\n"
        called += f"with contextlib.suppress(SystemExit): m.{function}(['--help'])\n"
    printed = run("-c", called, cwd=tmp_path, path=installed)
    assert printed.count("usage:") == len(SCRIPTS)


def test_pre_commit_runs_the_pinned_versions():
    constraints = (ROOT / "requirements/constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", constraints, flags=re.MULTILINE))
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {repo["repo"].rsplit("/", 1)[1]: repo["rev"] for repo in repos}
    assert versions["ruff-pre-commit"] == f"v{pinned['ruff']}"
    assert versions["codespell"] == f"v{pinned['codespell']}"
