import json

import pytest

from panet_d2 import cli

from ..common import load_script
from ..data.test_check_annotations import squares  # noqa: F401 (a fixture)
from ..data.test_shapes import cache  # noqa: F401 (a fixture)

tool = load_script("tools/check_dataset.py")


@pytest.fixture
def spoiled(squares):  # noqa: F811
    """Three errors and a warning, in the annotations and in the images."""
    squares.annotation(0, id=0)
    squares.annotation(2, category_id=99)
    squares.annotation(5, bbox=[5, 5, 0, 7])
    with open(squares.image(2), "wb"):
        pass
    squares.config()
    return squares


def check(squares, *args):  # noqa: F811
    return cli.run(tool.main, ["--annotations", squares.json_file, "--images", squares.root, *args])


def test_nothing_is_wrong(squares, capsys):  # noqa: F811
    assert check(squares) == 0
    assert capsys.readouterr().out == f"{squares.json_file}: 0 errors, 0 warnings\n"


def test_every_problem_and_a_summary(spoiled, capsys):
    assert check(spoiled) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: annotation 0 (image 1): annotation id is 0")
    assert lines[1].startswith("error: annotation 3 (image 2): unknown category (99)")
    assert lines[2].startswith("warning: annotation 6 (image 3): box of no area")
    assert lines[3].startswith(f"error: {spoiled.root}/003.png: image cannot be read")
    assert lines[4] == f"{spoiled.json_file}: 3 errors, 1 warnings"
    assert sorted(line.split(maxsplit=2) for line in lines[5:]) == [
        ["1", "error", "annotation id is 0"],
        ["1", "error", "image cannot be read"],
        ["1", "error", "unknown category"],
        ["1", "warning", "box of no area"],
    ]


def test_a_warning_alone(squares):  # noqa: F811
    squares.annotation(5, bbox=[5, 5, 0, 7])
    squares.config()
    assert check(squares) == 1


def test_for_machines(spoiled, capsys):
    assert check(spoiled, "--json", "--workers", "1") == 1
    [report] = json.loads(capsys.readouterr().out)["datasets"]
    assert (report["errors"], report["warnings"]) == (3, 1)
    assert report["annotations"] == spoiled.json_file and report["images"] == spoiled.root
    assert report["problems"][1] == {
        "where": "annotation 3 (image 2)",
        "what": "unknown category",
        "detail": "99",
        "severity": "error",
    }


def write_config(squares, tmp_path, *opts):  # noqa: F811
    path = tmp_path / "config.yaml"
    path.write_text(squares.config(*opts).dump())
    return str(path)


def test_data_sets_of_a_config(spoiled, tmp_path, capsys, monkeypatch):
    """Relative to DETECTRON2_DATASETS; those that training would refuse are no obstacle."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry = ["spoiled", "squares/instances.json", "squares/images"]
    opts = ("DATASETS.REGISTER_COCO", [entry], "DATASETS.TRAIN", ["spoiled"])
    config = write_config(spoiled, tmp_path, *opts, "MODEL.ROI_HEADS.NUM_CLASSES", 0)
    assert cli.run(tool.main, ["--config-file", config, "--json"]) == 1
    [report] = json.loads(capsys.readouterr().out)["datasets"]
    # Without evaluation an annotation may have the id 0.
    assert (report["name"], report["errors"], report["warnings"]) == ("spoiled", 2, 2)
    opts = ["--opts", "DATASETS.TEST", "('spoiled',)"]
    assert cli.run(tool.main, ["--config-file", config, "--json", *opts]) == 1
    [report] = json.loads(capsys.readouterr().out)["datasets"]
    assert (report["errors"], report["warnings"]) == (3, 1)


def test_masks_only_where_the_config_has_them(squares, tmp_path):  # noqa: F811
    squares.annotation(2, segmentation=None)
    config = write_config(squares, tmp_path)
    assert cli.run(tool.main, ["--config-file", config]) == 1
    assert cli.run(tool.main, ["--config-file", config, "--opts", "MODEL.MASK_ON", "False"]) == 0


def test_what_the_config_needs(squares, tmp_path, capsys):  # noqa: F811
    """Masks of test data, and images that its sizes leave."""
    for annotation in squares.content["annotations"]:
        del annotation["segmentation"]
    squares.image(0, height=1, width=2000)
    config = write_config(squares, tmp_path, "INPUT.MAX_SIZE_TEST", 500)
    test = ["--opts", "DATASETS.TRAIN", "()", "DATASETS.TEST", "('checked_squares',)"]
    assert cli.run(tool.main, ["--config-file", config, *test]) == 1
    out = capsys.readouterr().out
    assert "error: annotations: have no masks (MODEL.MASK_ON must be False)\n" in out
    assert "2000x1 pixels become 500x0 by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST" in out


def test_a_generated_data_set_is_made(cache, tmp_path, capsys):  # noqa: F811
    config = tmp_path / "config.yaml"
    config.write_text("DATASETS: {TRAIN: [panet_shapes_train], TEST: [panet_shapes_val]}\n")
    assert cli.run(tool.main, ["--config-file", str(config)]) == 0
    assert "panet_shapes_val: 0 errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--annotations", "lost.json", "--images", "{root}"], "lost.json"),
        (["--annotations", "{root}/001.png", "--images", "{root}"], "001.png is not a COCO"),
        (["--annotations", "{json}", "--images", "lost"], "no image folder lost"),
        (["--config-file", "lost.yaml"], "lost.yaml"),
        (["--config-file", "{config}", "--opts", "DATASETS.TRAIN", "()"], "nothing to check"),
        (["--config-file", "{config}", "--opts", "DATASETS.TRAIN", "('a',)"], "'a', which is nei"),
        (["--config-file", "{config}", "--opts", "NO.KEY", "1"], "NO.KEY"),
        (
            ["--config-file", "{config}", "--opts", "DATASETS.TRAIN", "('lvis_v1_val',)"],
            "'lvis_v1_val', which is not in COCO format",
        ),
    ],
)
def test_what_cannot_be_checked(squares, tmp_path, capsys, args, message):  # noqa: F811
    names = {"root": squares.root, "json": squares.json_file}
    names["config"] = write_config(squares, tmp_path)
    assert cli.run(tool.main, [arg.format(**names) for arg in args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--annotations", "a.json"],
        ["--images", "images"],
        ["--config-file", "a.yaml", "--annotations", "a.json", "--images", "images"],
        ["--config-file", "a.yaml", "--images", "images"],
        ["--config-file", "a.yaml", "--workers", "0"],
        ["--annotations", "a.json", "--images", "images", "--opts", "MODEL.MASK_ON", "False"],
    ],
)
def test_wrong_arguments(args):
    with pytest.raises(SystemExit) as e:
        cli.run(tool.main, args)
    assert e.value.code == 2
