import json
from pathlib import Path

import pytest
import yaml

from panet_d2 import cli
from panet_d2.engine import setup_config

from ..common import load_script, tiny_cfg, write_coco

plan_config = load_script("tools/plan_config.py")


@pytest.fixture
def args(tmp_path):
    (tmp_path / "base.yaml").write_text(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 9).dump())
    train = write_coco(tmp_path / "train", num_images=6)
    val = write_coco(tmp_path / "val")
    content = json.loads(Path(val[0]).read_text())
    content["annotations"] = [
        dict(content["annotations"][0], id=index) for index in range(1, 111)
    ]  # in one image, more than in any of training
    Path(val[0]).write_text(json.dumps(content))
    return ["--train", *train, "--val", *val, "--base", str(tmp_path / "base.yaml")]


def test_writes_a_config_for_any_folder(tmp_path, args, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [a.replace(str(tmp_path) + "/", "") for a in args]  # relative paths
    output = "out/mine.yaml"
    assert cli.run(plan_config.main, [*args, "--output", output, "--weights", "w.pth"]) == 0
    out = capsys.readouterr().out
    assert "quantiles" in out and "some anchor has IoU 0.5" in out and "kept as in the base" in out
    assert "--config-file out/mine.yaml" in out
    assert "DETECTIONS_PER_IMAGE: 200  # up to 110 objects" in out
    monkeypatch.chdir("/")
    cfg = setup_config(str(tmp_path / output))
    assert (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) == ("mine_train", "mine_val")
    assert cfg.MODEL.WEIGHTS == "w.pth" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    content = json.loads((tmp_path / "out/mine_plan.json").read_text())
    assert content["fingerprint"]["train"]["objects"] == 12
    assert content["plan"]["DATASETS.TRAIN"]["value"] == ["mine_train"]
    assert set(content["objects that some anchor overlaps"]["val"]) == {"base", "plan"}
    assert (tmp_path / "out/mine_plan.png").stat().st_size > 1000


def test_base_of_this_package(tmp_path, args):
    base = "panet_d2://DSB2018/mask_rcnn_R_18_FPN_gn.yaml"
    output = tmp_path / "mine.yml"
    assert cli.run(plan_config.main, [*args[:-1], base, "--output", str(output)]) == 0
    assert yaml.safe_load(output.read_text())["_BASE_"] == base


def test_dry_run_writes_nothing(tmp_path, args, capsys):
    before = sorted(tmp_path.iterdir())
    run = [*args, "--dry-run", "--output", str(tmp_path / "mine.yaml"), "--num-gpus", "2"]
    assert cli.run(plan_config.main, run) == 0
    assert sorted(tmp_path.iterdir()) == before
    out = capsys.readouterr().out
    assert "NUM_CLASSES: 3  # categories of the data" in out and "2 GPUs of" in out


def test_copies_in_the_validation_data(args, capsys):
    args[4:6] = args[1:3]  # the training data
    annotations = Path(args[1])
    annotations.write_text(annotations.read_text().replace("001.png", "leaf.png"))
    (Path(args[2]) / "001.png").rename(Path(args[2]) / "leaf.png")
    assert cli.run(plan_config.main, [*args, "--dry-run"]) == 0
    assert "1 validation images are named like training images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (("--base", "lost.yaml"), "lost.yaml does not exist"),
        (("--base", "panet_d2://Base-AFP.yaml"), ""),
        (("--train", "lost.json", "lost"), "cannot read lost.json"),
    ],
)
def test_what_cannot_be_used(args, change, message, capsys):
    args = args[3:] if "--train" in change else args
    status = cli.run(plan_config.main, [*args, *change, "--dry-run"])
    assert status == (1 if message else 0)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [0, 3])
def test_one_dataset_each(args, option, capsys):
    with pytest.raises(SystemExit) as e:
        cli.run(plan_config.main, [*args, *args[option : option + 3], "--dry-run"])
    assert e.value.code == 2 and f"{args[option]} takes one dataset" in capsys.readouterr().err


def test_inputs_are_not_overwritten(tmp_path, args, capsys):
    """The measurements have a name that an annotation file can have, if not easily."""
    folder = Path(args[1]).parent
    for name, output in (("a_plan.json", "a.yaml"), ("b.yaml", "b.yaml")):
        file = folder / name
        file.write_text(Path(args[1]).read_text())
        command = ["--train", str(file), args[2], *args[6:], "--output", str(folder / output)]
        assert cli.run(plan_config.main, command) == 1
        assert f"{file} is a folder or an input" in capsys.readouterr().err
        assert file.read_text() == Path(args[1]).read_text()
    output = str(folder / "instances.yaml")  # beside instances.json
    before = Path(args[1]).read_text()
    assert cli.run(plan_config.main, [*args, "--output", output]) == 0
    assert Path(args[1]).read_text() == before


def test_base_that_was_trained_for_other_classes(tmp_path, args):
    base = tmp_path / "base.yaml"
    cfg = tiny_cfg("DATASETS.CATEGORIES", [[7, "seven"]])
    base.write_text(cfg.dump())
    output = str(tmp_path / "mine.yaml")
    assert cli.run(plan_config.main, [*args, "--output", output]) == 0
    categories = setup_config(output).DATASETS.CATEGORIES
    assert [name for _, name in categories] == ["class0", "class1", "class2"]


@pytest.mark.parametrize("change", [(), ("--output", "a.json"), ("--dry-run", "--num-gpus", "-1")])
def test_arguments(args, change):
    with pytest.raises(SystemExit) as e:
        cli.run(plan_config.main, [*args, *change])
    assert e.value.code == 2
