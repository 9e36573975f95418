"""
Every command and Python program of the README and of docs/, run on a tiny model and dataset.

A command is shortened by the rules of :data:`SHORTER`. Commands of other kinds than these fail the
test: add a rule, or the test that runs them to :data:`ELSEWHERE`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from experiments import inference
from experiments.ablation import __main__ as ablation
from experiments.benchmark import __main__ as benchmark
from panet_d2 import cli, info
from panet_d2.engine import main as engine
from panet_d2.engine import setup_config

from ..checkpoint.test_mask_rcnn import DONOR, state
from ..common import ROOT, load_script, tiny_cfg, write_coco
from ..engine.test_launch import free_port
from ..test_lazyconfig import TINY
from .common import PAGES, code_blocks, relative

# Python programs of a page, or commands, and the tests that run them.
ELSEWHERE = {
    "docs/export.md": "tests/export/test_docs.py",
    "docs/programs.md": "tests/test_config.py",
    "CONTRIBUTING.md": "parts of a program",
    "DETECTRON2_ENV_MODULE=panet_d2.env python": "tests/test_config.py",
    "python datasets/prepare_dota.py": "tests/datasets/test_prepare_dota.py",
    "python datasets/prepare_isaid.py": "tests/datasets/test_prepare_isaid.py",
}

# What makes a command short, in this order. The flags stay.
SHORTER = [
    (r"TEST.AUG.ENABLED True", "TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES [64]"),
    (r"--num-(gpus|machines) \d", r"--num-\1 1"),
    (r"--(nnodes|nproc-per-node) \d", r"--\1 1"),
    (r"first-machine:29500", "127.0.0.1:{port}"),
    (r"SOLVER.MAX_ITER \d+", "SOLVER.MAX_ITER 2"),
    (r"logsumexp", "max"),  # the example of CONTRIBUTING.md
    (r"(train_net.py .*--config-file) configs/\S+\.yaml", r"\1 cells.yaml"),
    (r"(check_dataset.py .*--config-file) configs/\S+\.yaml", r"\1 cells.yaml"),
    (r"(--config-file) configs/\S+\.py", r"\1 tiny.py"),
    (r"(train_net.py .*--config-file) FILE", r"\1 cells.yaml"),
    (r"(--config-file) (FILE|my.yaml)", r"\1 output/cells/config.yaml"),
    (r"(?:output/| )model_final.pth", " output/cells/model_final.pth"),
    (r"(plan_config.py .*--output) cells.yaml", r"\1 planned.yaml"),
    (r"(plan_config.py .*--config-file) configs/\S+", r"\1 cells.yaml"),
    (r"(convert_weights.py mask-rcnn .*)$", r"\1 --config-file cells.yaml"),
    (r"(demo.py (?!.*--output).*--input \S+)", r"\1 --output pictures"),
]
BENCHMARK = "--config-file cells.yaml --size 64 96 --repeats 1 --warmup 0"


def commands(page):
    """The commands of the blocks of a page, and those in the cells of its tables."""
    for block in code_blocks(page, "sh"):
        if block.startswith("#!"):
            yield block
        else:
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", line)).strip()
    for row in re.findall(r"^\|.*", page.read_text(), flags=re.MULTILINE):
        yield from re.findall(r"`((?:python|pip|make|\w+=\S+ python) [^`]+)`", row)


SLOW = re.compile("#!|torchrun|.*(experiments.benchmark|export_model.py)")
PAGE_OF = {command: page for page in reversed(PAGES) for command in commands(page)}
COMMANDS = [
    pytest.param(
        command,
        id=f"{relative(page)}: {command[:70]}",
        marks=pytest.mark.slow if SLOW.match(command) else (),
    )
    for command, page in PAGE_OF.items()
]
PROGRAMS = [
    pytest.param(program, id=f"{relative(page)}-{index}")
    for page in PAGES
    if relative(page) not in ELSEWHERE
    for index, program in enumerate(code_blocks(page, "python"))
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the commands read: a dataset, configs, a finished run, images and checkpoints."""
    folder = tmp_path_factory.mktemp("workspace")
    for split in ("train", "val"):
        json_file, images = write_coco(folder / f"made_{split}")
        for target in (folder, folder / "cells"):
            target.mkdir(exist_ok=True)
            shutil.copy(json_file, target / f"{split}.json")
            shutil.copytree(images, target / split)
    entries = [
        [f"cells_{split}", str(folder / f"cells/{split}.json"), str(folder / f"cells/{split}")]
        for split in ("train", "val")
    ]
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", entries),
        *("DATASETS.TRAIN", ["cells_train"]),
        *("DATASETS.TEST", ["cells_val"]),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 2),
        *("SOLVER.STEPS", []),
    )
    (folder / "cells.yaml").write_text(cfg.dump())
    (folder / "tiny.py").write_text(
        TINY.format(json_file=entries[0][1], image_root=entries[0][2], output_dir="output/lazy")
    )
    config_file, run = str(folder / "cells.yaml"), str(folder / "output/cells")
    assert engine.main(["--config-file", config_file, "OUTPUT_DIR", run]) == 0
    for name in ("model.pth", "start.pth"):
        shutil.copy(folder / "output/cells/model_final.pth", folder / name)
    picture = np.random.RandomState(0).randint(0, 256, (64, 96, 3), np.uint8)
    for name in ("image.jpg", "a.jpg", "folder/a.png", "more/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name), picture)
    cv2.imwrite(str(folder / "deep.tif"), picture[..., 0].astype(np.uint16) * 16)
    for name in ("model_final_f10217.pkl", "model.pkl"):
        torch.save({"model": state(*DONOR)}, folder / name)
    nucleus = folder / "stage1_train/0123"
    for name, pixels in (("images/0123.png", picture), ("masks/0.png", picture[..., 0] > 99)):
        (nucleus / name).parent.mkdir(parents=True)
        cv2.imwrite(str(nucleus / name), pixels.astype(np.uint8) * (1 if pixels.ndim > 2 else 255))
    shutil.make_archive(str(folder / "stage1_train"), "zip", folder / "stage1_train")
    return folder


@pytest.fixture
def here(workspace, tmp_path, monkeypatch):
    """A copy of the workspace, as the current folder."""
    shutil.copytree(workspace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "work"


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, here, monkeypatch, capsys):
    for name in re.findall(r"--config-file (configs/\S+)", command):
        assert (ROOT / name).is_file(), name
    for pattern, shorter in SHORTER:
        command = re.sub(pattern, shorter.format(port=free_port()), command)
    if command.startswith(("#!", "torchrun ", "srun ")):
        run_in_a_shell(command, here)
    elif not command.startswith(tuple(ELSEWHERE)):
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-m"]:
            run_module(words[2], words[3:], monkeypatch)
        elif words[0] == "python":
            run_script(words[1], words[2:], capsys)
        else:
            check_installation(words)


def run_script(script, args, capsys):
    if script == "train_net.py":
        if "--resume" not in args and "--eval-only" not in args:
            args += ["OUTPUT_DIR", "output/new"]  # the folder of the finished run is rejected
        elif "OUTPUT_DIR" not in args:
            args += ["OUTPUT_DIR", "output/cells"]
        assert engine.main(args) == 0
        return
    status = cli.run(load_script(script).main, args)
    if script.endswith("convert_weights.py") and args[0] != "mask-rcnn":
        # These checkpoints are not at hand. tests/checkpoint/ converts such names and shapes.
        assert status == 1 and f"there is no file {args[1]}" in capsys.readouterr().err
    elif script.endswith("check_dataset.py"):
        assert status == 0, capsys.readouterr().out
    else:
        assert status == 0, capsys.readouterr().err


def run_module(module, args, monkeypatch):
    if module == "panet_d2.info":
        monkeypatch.setattr(sys, "argv", ["info", *args])
        assert not info.main()
    elif module == "experiments.benchmark":
        opts = args.index("--opts") if "--opts" in args else len(args)
        boxes = [] if "--boxes" in args else ["--boxes", "3"]
        args = [*args[:opts], *shlex.split(BENCHMARK), *boxes, "--no-ladder", *args[opts:]]
        assert cli.run(benchmark.main, args) == 0
    elif module == "experiments.inference":
        few = ["--only", "one scale", "box voting", "--images", "1"]
        assert cli.run(inference.main, [*args, *few]) == 0
    elif module == "experiments.ablation":
        # What would be trained is compared with the committed runs by tests/experiments/.
        made = []
        monkeypatch.setattr(ablation, "setup_config", partial(setup_config, needed=()))
        monkeypatch.setattr(ablation, "pretrained_resnet", lambda *_: "resnet.pth")
        monkeypatch.setattr(ablation, "run_all", lambda runs, *_: made.extend(runs) or ["failed"])
        assert cli.run(ablation.main, [*args, "--results", "results"]) == 1 and made
    else:
        assert module == "pytest", f"no test runs python -m {module}"
        assert all((ROOT / name).is_file() for name in args if name.endswith(".py"))


def run_in_a_shell(command, folder):
    """Stands in for SLURM: one machine, on which srun starts its command."""
    programs = folder / "bin"
    programs.mkdir()
    torchrun = f'exec {sys.executable} -W ignore -m torch.distributed.run "$@"'
    for name, body in (
        ("torchrun", torchrun),
        ("srun", 'exec "$@"'),
        ("scontrol", "echo 127.0.0.1"),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    command = command.replace("train_net.py", f"{ROOT}/train_net.py").replace("29500", "$PORT")
    if "--resume" in command:
        command = f"{command.rstrip()} OUTPUT_DIR output/cells"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path),
        "PORT": str(free_port()),
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "a",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def check_installation(words):
    """Commands that install, build or set something, which only the names are checked of."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        for word in words[1:]:
            name, _, value = word.partition("=")
            assert name in (variables if value else targets), word
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra
    else:
        known = (["export"], [".", ".venv/bin/activate"])
        assert words[:1] in known or words in known, f"no test runs {shlex.join(words)}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, here):
    exec(program, {"__name__": "__main__"})


def test_config_of_getting_started(here, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(here))
    [text] = code_blocks(ROOT / "docs/getting_started.md", "yaml")
    Path("own.yaml").write_text(text)
    cfg = setup_config("own.yaml")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and cfg.MODEL.ROI_BOX_HEAD.AFP.ENABLED
    assert tuple(cfg.DATASETS.TEST) == ("cells_val",)
