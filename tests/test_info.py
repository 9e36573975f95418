from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import panet_d2
from panet_d2 import cli, info
from panet_d2.data.datasets import shapes
from panet_d2.data.register import find_coco_files
from panet_d2.engine import launch
from panet_d2.layers import multilevel_roi_align

from .common import child_env

UNUSED = {"machine_rank": 0, "dist_url": ""}


def test_versions():
    collected = info.collect_info()
    assert collected["panet_d2"] == panet_d2.__version__
    assert collected["torch"] == torch.__version__
    assert all(value is None or value for value in collected.values())


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "detectron2._C", None)
    collected = info.collect_info()
    assert collected["Triton"].startswith("no: ")
    assert collected["Detectron2's compiled ops"].startswith("no: ")


@pytest.mark.parametrize("value, expected", [(None, "cpu"), ("reference", "reference")])
def test_roi_align_of_a_device_is_the_one_that_runs(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv("PANET_D2_ROI_ALIGN", raising=False)
    else:
        monkeypatch.setenv("PANET_D2_ROI_ALIGN", value)
    ran = []
    # By import_module, because the package has a function of the module's name.
    module = import_module("panet_d2.layers.multilevel_roi_align")
    for name, function in (
        ("cpu", module.roi_align_levels_cpu),
        ("reference", module.multilevel_roi_align_reference),
    ):

        def spy(*args, name=name, function=function):
            ran.append(name)
            return function(*args)

        monkeypatch.setattr(module, function.__name__, spy)
    boxes = torch.tensor([[0.0, 1, 1, 9, 9]])
    module.multilevel_roi_align([torch.rand(1, 2, 8, 8)], boxes, [0.5], (2, 2), 2, True)
    collected = info.collect_info()
    assert [collected["RoIAlign on cpu"]] == ran == [expected]
    assert collected["$PANET_D2_ROI_ALIGN"] == value


def test_every_device_is_listed(monkeypatch):
    cuda = {
        "device_count": lambda: 2,
        "get_device_name": "GPU {}".format,
        "get_device_capability": lambda index: (9, index),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: asked.append(device) or tensor)
    collected = info.collect_info()
    assert collected["cuda:1"] == "GPU 1, 9.1" and "RoIAlign on cuda:1" in collected
    assert asked == ["cpu", "cuda:0", "cuda:1"]


class RecordedEnvironment(dict):
    """Keeps the names that are asked for by the package."""

    def __init__(self):
        super().__init__(os.environ)
        self.asked = set()

    def _ask(self, name):
        module = sys._getframe(2).f_globals["__name__"]
        if module == "os":  # os.getenv
            module = sys._getframe(3).f_globals["__name__"]
        if module.split(".")[0] == "panet_d2":
            self.asked.add(name)

    def __getitem__(self, name):
        self._ask(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self._ask(name)
        return super().__contains__(name)

    def get(self, name, default=None):
        self._ask(name)
        return super().get(name, default)


def test_every_variable_that_is_read_is_listed(monkeypatch, tmp_path):
    recorded = RecordedEnvironment()
    monkeypatch.setattr(os, "environ", recorded)
    # Whatever asks for one.
    cli.run(lambda: find_coco_files("x", "lost.json", str(tmp_path)))
    shapes._folder(None)
    multilevel_roi_align([torch.rand(1, 2, 8, 8)], torch.zeros(1, 5), [0.5], (2, 2), 2, True)
    launch(lambda args: None, argparse.Namespace(num_gpus=1, num_machines=1, **UNUSED))
    torchrun = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
    assert recorded.asked - torchrun == set(info.ENVIRONMENT)


def test_command():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "panet_d2.info", "--json"],
        env=child_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["panet_d2"] == panet_d2.__version__


def test_an_unknown_roi_align_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", "cuda")
    assert info.main(["--json"]) == cli.FAILED
    assert capsys.readouterr().err.count("\n") == 1


def test_detectron2s_report_follows(capsys):
    info.main([])
    printed = capsys.readouterr().out
    assert re.search(r"^panet_d2 +\d", printed, re.M)
    assert re.search(r"^sys\.platform ", printed, re.M)
