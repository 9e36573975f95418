import pytest
import torch
from detectron2.modeling import build_model

from panet_d2 import cli

from ..checkpoint.test_mask_rcnn import DONOR, state
from ..common import load_script, tiny_cfg, write_coco

tool = load_script("tools/convert_weights.py")


@pytest.fixture
def donor(tmp_path):
    json_file, root = write_coco(tmp_path / "squares")
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["converted_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["converted_squares"]),
    )
    (tmp_path / "panet.yaml").write_text(cfg.dump())
    torch.save({"model": state(*DONOR)}, tmp_path / "donor.pth")
    return tmp_path


def convert(folder, *args):
    files = [str(folder / name) for name in ("donor.pth", "out.pth")]
    return cli.run(
        tool.main, ["mask-rcnn", *files, "--config-file", str(folder / "panet.yaml"), *args]
    )


@pytest.mark.parametrize("calibrate", [False, True])
def test_account_and_weights(donor, calibrate, capsys):
    assert convert(donor, *(("--calibrate", "2") if calibrate else ())) == 0
    printed = capsys.readouterr().out
    assert "carried" in printed and "into every level" in printed
    assert ("into every level, calibrated" in printed) == calibrate
    weights = torch.load(donor / "out.pth", weights_only=True)["model"]
    build_model(tiny_cfg()).load_state_dict(weights)
    layers = weights["roi_heads.box_pooler.adaptation_layers.weight"].chunk(4)
    assert torch.equal(layers[0], layers[1]) != calibrate


@pytest.mark.parametrize("kept", ["donor.pth", "panet.yaml"])
def test_inputs_are_not_overwritten(donor, kept, capsys):
    before = (donor / kept).read_bytes()
    files = [str(donor / "donor.pth"), str(donor / kept)]
    command = ["mask-rcnn", *files, "--config-file", str(donor / "panet.yaml")]
    assert cli.run(tool.main, command) == 1
    assert f"{donor / kept} is a folder or an input" in capsys.readouterr().err
    assert (donor / kept).read_bytes() == before


def test_calibration_needs_training_data(donor, capsys):
    assert convert(donor, "--calibrate", "2", "--opts", "DATASETS.TRAIN", "[]") == 1
    assert "DATASETS.TRAIN" in capsys.readouterr().err
    assert not (donor / "out.pth").exists()


def test_allow_unmatched_is_for_rules(donor, capsys):
    with pytest.raises(SystemExit):
        convert(donor, "--allow-unmatched", "x*")
    assert "--allow-unmatched is for release and mmdet" in capsys.readouterr().err


@pytest.mark.parametrize("kind, count", [("release", "2"), ("mask-rcnn", "0")])
def test_calibration_is_for_warm_starts(kind, count, capsys):
    with pytest.raises(SystemExit):
        cli.run(tool.main, [kind, "in.pth", "out.pth", "--calibrate", count])
    assert "--calibrate is for mask-rcnn" in capsys.readouterr().err
