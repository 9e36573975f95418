from __future__ import annotations

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from panet_d2 import PAFPN, PANetMaskHead, PANetROIHeads, model_zoo

from .common import ROOT, child_env

SMALL = "Shapes/panet_R_18_FPN_gn.yaml"  # names no weights
FULL = "COCO-InstanceSegmentation/panet_R_50_FPN_1x"


def test_a_checkout_has_its_own_configs():
    assert Path(model_zoo.get_config_file(SMALL)) == ROOT / "configs" / SMALL


def test_same_functions_as_detectron2s():
    assert set(model_zoo.__all__) == set(detectron2_zoo.__all__)
    for name in model_zoo.__all__:
        ours, theirs = (signature(getattr(zoo, name)) for zoo in (model_zoo, detectron2_zoo))
        arguments = [(p.name, p.kind, p.default) for p in ours.parameters.values()]
        assert arguments == [(p.name, p.kind, p.default) for p in theirs.parameters.values()], name


@pytest.mark.parametrize("function", [model_zoo.get_config_file, model_zoo.get])
@pytest.mark.parametrize("name", ["COCO-InstanceSegmentation/panet_R_18_FPN_9x.yaml", "Shapes"])
def test_unknown_config(function, name):
    with pytest.raises(RuntimeError, match=f"{name} not available"):
        function(name)


@pytest.mark.parametrize("name", [SMALL, f"{FULL}.py"])
def test_there_are_no_trained_weights(name):
    for function in (model_zoo.get_config, model_zoo.get):
        with pytest.raises(RuntimeError, match="not available!.*no trained weights"):
            function(name, trained=True)
    with pytest.raises(RuntimeError, match="not available!"):
        model_zoo.get_checkpoint_url(name)


def test_yaml_config():
    cfg = model_zoo.get_config(f"{FULL}.yaml")
    assert isinstance(cfg, CfgNode)
    assert cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED and cfg.MODEL.ROI_BOX_HEAD.AFP.ENABLED
    assert cfg.MODEL.WEIGHTS.endswith("R-50.pkl")


def test_lazy_config():
    cfg = model_zoo.get_config(f"{FULL}.py")
    assert {"dataloader", "lr_multiplier", "model", "optimizer", "train"} == set(cfg)
    assert cfg.train.init_checkpoint.endswith("R-50.pkl")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_model(device):
    model = model_zoo.get(SMALL, device=device)
    assert model.training
    assert isinstance(model.backbone, PAFPN) and isinstance(model.roi_heads, PANetROIHeads)
    on_cuda = device is None and torch.cuda.is_available()
    assert model.device.type == ("cuda" if on_cuda else "cpu")


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a model like that of SMALL."""
    cfg = model_zoo.get_config(SMALL)
    cfg.MODEL.DEVICE = "cpu"
    state = build_model(cfg).state_dict()
    torch.save({"model": state}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth", state


def in_zoo(monkeypatch, folder, name, content):
    """Another config that is in the zoo."""
    (folder / name).write_text(content)
    monkeypatch.setattr("panet_d2.model_zoo.model_zoo._FOLDERS", (folder,))


def test_weights_of_a_yaml_config_are_loaded(weights, tmp_path, monkeypatch):
    path, state = weights
    base = model_zoo.get_config_file(SMALL)
    in_zoo(monkeypatch, tmp_path, "zoo.yaml", f"_BASE_: {base}\nMODEL:\n  WEIGHTS: {path}\n")
    loaded = model_zoo.get("zoo.yaml", device="cpu").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


LAZY = """
from detectron2.config import LazyCall as L
from panet_d2 import PANetMaskHead
from detectron2.layers import ShapeSpec

model = L(PANetMaskHead)(
    input_shape=ShapeSpec(channels=4, height=7, width=7), num_classes=2, conv_dims=[4, 4]
)
"""


def test_lazy_model_and_its_weights(tmp_path, monkeypatch):
    in_zoo(monkeypatch, tmp_path, "zoo.py", LAZY)
    model = model_zoo.get("zoo.py")
    assert isinstance(model, PANetMaskHead) and model.predictor.weight.device.type == "cpu"
    assert model_zoo.get("zoo.py", device="meta").predictor.weight.device.type == "meta"
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    in_zoo(monkeypatch, tmp_path, "zoo.py", f"{LAZY}\ntrain = dict(init_checkpoint={str(path)!r})")
    loaded, state = model_zoo.get("zoo.py").state_dict(), model.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_pkg_resources_is_not_needed():
    """setuptools does not have it any more, and Detectron2's model zoo imports it."""
    code = (
        "import sys; sys.modules['pkg_resources'] = None\n"
        f"from panet_d2 import model_zoo; model_zoo.get_config({SMALL!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
