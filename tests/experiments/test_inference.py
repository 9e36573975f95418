import json

import pytest
import torch
from detectron2.modeling import build_model

from experiments import inference as tool
from panet_d2 import cli

from ..common import tiny_cfg, write_coco

ROWS = ["one scale", "Soft-NMS and voting", "all"]
NO_AFP = ("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False, "MODEL.ROI_MASK_HEAD.AFP.ENABLED", False)


def write_model(folder, name, *opts):
    json_file, root = write_coco(folder / name)
    data = ("DATASETS.REGISTER_COCO", [[f"inference_{name}", json_file, root]])
    cfg = tiny_cfg(*data, "DATASETS.TEST", [f"inference_{name}"], *opts)
    torch.save({"model": build_model(cfg).state_dict()}, folder / f"{name}.pth")
    (folder / f"{name}.yaml").write_text(cfg.dump())
    return ["--model", name, str(folder / f"{name}.yaml"), str(folder / f"{name}.pth")]


def test_every_row_is_a_config():
    for values in tool.options(64).values():
        tiny_cfg(*(part for pair in values.items() for part in pair))


def test_end_to_end(tmp_path, capsys):
    """Also of a model with Detectron2's heads. A second call evaluates nothing."""
    command = [
        *write_model(tmp_path, "panet"),
        *write_model(tmp_path, "stock", *NO_AFP, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("--output", str(tmp_path / "out"), "--images", "1", "--only", *ROWS),
    ]
    assert cli.run(tool.main, command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    for name in ("panet", "stock"):
        rows = results["models"][name]
        assert list(rows) == ROWS
        assert [rows[row]["forward passes"] for row in ROWS] == [1, 1, 48]
        assert rows["all"]["images"] == 1 and rows["all"]["s/image"] > 0
        assert {"mask AP", "box AP", "mask APs"} <= rows["all"].keys()
    text = (tmp_path / "out/README.md").read_text()
    assert text.count("| Soft-NMS and voting ") == 2 and "## stock" in text
    before = results["models"]
    assert cli.run(tool.main, command) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["models"] == before


@pytest.mark.parametrize(
    "opts, message",
    [
        (["INPUT.MIN_SIZE_TEST", "0"], "INPUT.MIN_SIZE_TEST is 0"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST must name one"),
    ],
)
def test_mistakes(tmp_path, capfd, opts, message):
    model = write_model(tmp_path, "wrong")
    assert cli.run(tool.main, [*model, "--output", str(tmp_path / "out"), "--opts", *opts]) == 1
    assert message in capfd.readouterr().err


def test_table_leaves_out_sizes_that_no_object_has():
    row = {"forward passes": 1, "s/image": 0.5, "images": 2, "mask AP": 40.04, "mask APl": None}
    head, _, line = tool.table({"one scale": row}).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (head, line)]
    assert cells == [
        ["option", "forward passes", "s/image", "mask AP"],
        ["one scale", "1", "0.50", "40.0"],
    ]
