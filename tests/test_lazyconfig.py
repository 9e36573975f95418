"""The LazyConfig files and the tool that trains them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model

from panet_d2 import cli, model_zoo

from .common import ROOT, child_env, load_script, write_coco

tool = load_script("tools/lazyconfig_train_net.py")

LAZY = sorted(
    str(f.relative_to(ROOT / "configs").with_suffix(""))
    for f in (ROOT / "configs").rglob("*.py")
    if "common" not in f.parts
)

# The example's model, small enough for two steps on a CPU, with another data set.
TINY = """
from detectron2.layers import ShapeSpec
from panet_d2 import model_zoo
from panet_d2.data import register_coco_file

register_coco_file("lazy_squares", {json_file!r}, {image_root!r})
_cfg = model_zoo.get_config("COCO-InstanceSegmentation/panet_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _cfg.dataloader, _cfg.lr_multiplier, _cfg.model
optimizer, train = _cfg.optimizer, _cfg.train

bottom_up = model.backbone.bottom_up
bottom_up.freeze_at = 0
bottom_up.stem.norm = "GN"
bottom_up.stages.update(depth=18, norm="GN")
del bottom_up.stages.stride_in_1x1  # a ResNet-18 has no 1x1 convs
model.backbone.out_channels = model.proposal_generator.head.in_channels = 32
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.post_nms_topk = (50, 50)
heads = model.roi_heads
heads.num_classes = 3
heads.batch_size_per_image = 16
heads.box_pooler.update(in_channels=32, adaptation_dim=48)
heads.box_head.update(input_shape=ShapeSpec(channels=48, height=1, width=1), fc_dims=[48])
heads.box_predictor.input_shape = ShapeSpec(channels=48)
heads.mask_pooler.update(in_channels=32, adaptation_dim=24)
heads.mask_head.update(
    input_shape=ShapeSpec(channels=24, height=14, width=14), conv_dims=[24, 24, 24, 24]
)

dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.dataset.names = dataloader.test.dataset.names = "lazy_squares"
dataloader.train.mapper.update(instance_mask_format="bitmask")
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.test.num_workers = 0
train.update(init_checkpoint="", max_iter=2, log_period=1, seed=1, output_dir={output_dir!r})
"""


@pytest.mark.parametrize("name", LAZY)
def test_model_is_the_yaml_files(name):
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        from_yaml = build_model(cfg)
        lazy = instantiate(model_zoo.get_config(f"{name}.py").model)
    for tensors in (torch.nn.Module.state_dict, lambda m: dict(m.named_parameters())):
        ours, theirs = (
            {k: (v.shape, v.dtype, v.requires_grad) for k, v in tensors(model).items()}
            for model in (lazy, from_yaml)
        )
        assert ours == theirs
    # What has no tensors too: fusion, sampling ratios, sizes.
    assert repr(lazy) == repr(from_yaml)


def test_there_is_an_example():
    assert "COCO-InstanceSegmentation/panet_R_50_FPN_1x" in LAZY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LazyConfig, its data set, and a finished run of two steps in `run`."""
    folder = tmp_path_factory.mktemp("lazyconfig")
    json_file, image_root = write_coco(folder / "squares", num_images=3)
    (folder / "tiny.py").write_text(
        TINY.format(json_file=json_file, image_root=image_root, output_dir=str(folder / "run"))
    )
    assert train_net(folder) == 0
    return folder


def train_net(folder, *args):
    return cli.run(tool.main, ["--config-file", str(folder / "tiny.py"), *args])


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


def test_trains_and_evaluates(folder):
    assert (folder / "run/config.yaml").is_file()
    checkpoint = torch.load(folder / "run/model_final.pth", weights_only=False)
    assert checkpoint["trainer"]["iteration"] == 1
    *steps, evaluation = metrics(folder / "run")
    assert len(steps) == 2 and all(0 < step["total_loss"] < float("inf") for step in steps)
    assert {"bbox/AP", "segm/AP"} <= evaluation.keys()


def test_eval_only_is_of_the_checkpoint(folder, monkeypatch):
    evaluated = []

    def evaluate(cfg, model):
        evaluated.append((model.state_dict(), original(cfg, model)))

    original = tool.evaluate
    monkeypatch.setattr(tool, "evaluate", evaluate)
    weights = str(folder / "run/model_final.pth")
    other = f"train.output_dir={folder / 'eval'}"
    assert train_net(folder, "--eval-only", f"train.init_checkpoint={weights}", other) == 0
    assert train_net(folder, "--eval-only", "--resume") == 0
    expected = torch.load(weights, weights_only=False)["model"]
    assert len(evaluated) == 2
    for state, results in evaluated:
        assert results.keys() == {"bbox", "segm"}
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k].cpu(), expected[k]) for k in expected)


def test_resumes_where_it_stopped(folder):
    half = folder / "half"
    shutil.copytree(folder / "run", half)
    args = [f"train.output_dir={half}", "train.max_iter=3", "dataloader.evaluator.tasks=[bbox]"]
    assert train_net(folder, "--resume", *args) == 0
    checkpoint = torch.load(half / "model_final.pth", weights_only=False)
    assert checkpoint["trainer"]["iteration"] == 2
    # It did not start again.
    steps = [line["iteration"] for line in metrics(half) if "total_loss" in line]
    assert steps == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would need two GPUs")
def test_two_processes(folder):
    run = folder / "two"
    tool_file = str(ROOT / "tools/lazyconfig_train_net.py")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", tool_file]
    options = ["--config-file", str(folder / "tiny.py"), f"train.output_dir={run}"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *options],
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["iteration"] for line in metrics(run) if "total_loss" in line] == [0, 1]
    assert (run / "model_final.pth").is_file() and (run / "log.txt.rank1").is_file()


def test_starts_from_a_checkpoint(folder, monkeypatch):
    started = []
    monkeypatch.setattr(
        tool.SimpleTrainer, "train", lambda self, *a: started.append((self.model.state_dict(), a))
    )
    weights = str(folder / "run/model_final.pth")
    other = f"train.output_dir={folder / 'new'}"
    assert train_net(folder, f"train.init_checkpoint={weights}", other) == 0
    ((state, (start_iter, max_iter)),) = started
    expected = torch.load(weights, weights_only=False)["model"]
    assert (start_iter, max_iter) == (0, 2)
    assert all(torch.equal(state[k].cpu(), expected[k]) for k in expected)


@pytest.mark.filterwarnings("ignore:.*GradScaler")  # it needs CUDA
def test_continues_in_mixed_precision():
    """The checkpoint of a run in float32 has no scale of the loss."""
    model = torch.nn.Linear(2, 1)

    def trainer(kind):
        return kind(model, [], torch.optim.SGD(model.parameters(), lr=0.1))

    before = trainer(tool.SimpleTrainer)
    before.iter = 7
    after = trainer(tool.ResumableAMPTrainer)
    after.load_state_dict(before.state_dict())
    assert after.iter == 7 and "grad_scaler" in after.state_dict()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "holds another run.*--resume"),
        (["--eval-only", "train.output_dir={new}"], "train.init_checkpoint is empty"),
        (
            ["train.output_dir={new}", "dataloader.test.dataset.names=coco_2017_val"],
            "'coco_2017_val': .*instances_val2017.json does not exist",
        ),
        (
            ["--eval-only", "--resume", "model.roi_heads.mask_head.fc_fusion=False"],
            "not in the model: roi_heads.mask_head.fc_fusion",
        ),
        (
            ["train.output_dir={new}", "model.roi_heads.num_classes=4"],
            "model.roi_heads.num_classes is 4, but dataset 'lazy_squares' has 3 classes; .* be 3",
        ),
        (["--resume", "train.max_iter"], "train.max_iter: "),
        (["--resume", "train.max_iter.x=1"], "train.max_iter is not a config"),
        pytest.param(
            ["--resume", "train.amp.enabled=True"],
            "train.amp.enabled is True",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can do that"),
        ),
    ],
)
def test_mistakes_are_one_sentence(folder, args, message, capsys):
    before = (folder / "run/model_final.pth").read_bytes()
    assert train_net(folder, *(a.format(new=folder / "none") for a in args)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert (folder / "run/model_final.pth").read_bytes() == before


def test_file_that_is_not_there(capsys):
    assert cli.run(tool.main, ["--config-file", "configs/none.py"]) == 1
    assert "configs/none.py" in capsys.readouterr().err
