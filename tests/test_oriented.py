"""Datasets and models with oriented boxes."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import RotatedCOCOEvaluator
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads, build_model
from detectron2.structures import BoxMode, Instances, RotatedBoxes

from panet_d2 import ConfigError, DataError
from panet_d2.data import NamedImageMapper, check_annotations, setup_datasets
from panet_d2.engine import Trainer
from panet_d2.evaluation import build_evaluator
from panet_d2.planning import read_fingerprint

from .common import load_script, tiny_cfg, write_coco
from .detectron2_parity.common import needs_rotated_ops

ORIENTED = (
    *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
    *("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]]),
    *("MODEL.ANCHOR_GENERATOR.ANGLES", [[-45, 0, 45]]),
    *("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0, 1.0)),
    *("MODEL.ROI_HEADS.NAME", "PANetRROIHeads"),
    *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
    *("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0, 1.0)),
    *("MODEL.MASK_ON", False),
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Squares as oriented boxes; the file's path, and its content."""
    json_file, _ = write_coco(tmp_path / "squares")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with open(json_file) as f:
        content = json.load(f)
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x + w / 2, y + h / 2, w, h, 90 * (a["id"] % 2) + 10.0]
        del a["segmentation"]
    with open(json_file, "w") as f:
        json.dump(content, f)
    return json_file, content


def config(*opts):
    return tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["turned", "squares/instances.json", "squares/images"]]),
        *("DATASETS.TRAIN", ["turned"]),
        *("DATASETS.TEST", ["turned"]),
        *ORIENTED,
        *opts,
    )


def errors(content):
    return [str(p) for p in check_annotations(content) if p.severity == "error"]


def test_the_check_accepts_them(data):
    assert errors(data[1]) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": [10, 10, 5, 5]}, r"box is not five numbers \(\[10, 10, 5, 5\]; most others are"),
        ({"bbox": [10, 10, 5, 5, None]}, "box is not five numbers"),
        ({"bbox": [10, 10, -5, 5, 0]}, "box of negative size"),
        ({"iscrowd": 1}, "crowd with an oriented box"),
    ],
)
def test_the_check_refuses(data, change, message):
    data[1]["annotations"][0].update(change)
    (error,) = errors(data[1])
    assert re.search(message, error)


def test_a_single_one_among_upright_boxes(tmp_path):
    with open(write_coco(tmp_path / "squares")[0]) as f:
        content = json.load(f)
    content["annotations"][0]["bbox"].append(30.0)
    (error,) = errors(content)
    assert "box is not four numbers" in error


def test_registered(data):
    setup_datasets(config())
    assert MetadataCatalog.get("turned").evaluator_type == "coco_rotated"
    annotations = DatasetCatalog.get("turned")[0]["annotations"]
    assert {a["bbox_mode"] for a in annotations} == {BoxMode.XYWHA_ABS}


def test_loaded_for_training(data):
    cfg = config("INPUT.MIN_SIZE_TRAIN", [128], "INPUT.MAX_SIZE_TRAIN", 1000)
    setup_datasets(cfg)
    record = DatasetCatalog.get("turned")[0]
    before = np.array([a["bbox"] for a in record["annotations"]])
    mapper, seen = NamedImageMapper(cfg, True), set()
    while len(seen) < 2:  # flipped and not
        boxes = mapper(record)["instances"].gt_boxes
        assert isinstance(boxes, RotatedBoxes)
        x, y, w, h, angle = boxes.tensor.double().numpy().T
        flipped = bool(angle[0] < 0)
        seen.add(flipped)
        expected = before * [2, 2, 2, 2, 1]
        if flipped:
            expected = [192, 0, 0, 0, 0] + expected * [-1, 1, 1, 1, -1]
        assert np.allclose(np.stack([x, y, w, h, angle], 1), expected, atol=1e-3)


def test_crowds_are_left_out(data):
    cfg = config()
    setup_datasets(cfg)
    record = DatasetCatalog.get("turned")[0]
    for a in record["annotations"]:
        a["iscrowd"] = 1
    assert len(NamedImageMapper(cfg, True)(record)["instances"]) == 0


def test_evaluator(data, tmp_path):
    cfg = config("OUTPUT_DIR", str(tmp_path / "out"))
    setup_datasets(cfg)
    assert type(build_evaluator(cfg, "turned")) is RotatedCOCOEvaluator


@pytest.mark.parametrize(
    "opts, message",
    [
        (("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"), "'RPN', but dataset 'turned' has oriented"),
        (("INPUT.CROP.ENABLED", True), "INPUT.CROP.ENABLED is True"),
        (("INPUT.RANDOM_FLIP", "vertical"), "INPUT.RANDOM_FLIP is 'vertical'"),
    ],
)
def test_configs_for_upright_boxes(data, opts, message):
    with pytest.raises(ConfigError, match=message):
        setup_datasets(config(*opts))


def test_upright_boxes_for_an_oriented_model(tmp_path, monkeypatch):
    write_coco(tmp_path / "squares")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(ConfigError, match="'RRPN', but dataset 'turned' has upright boxes"):
        setup_datasets(config())


@pytest.mark.parametrize(
    "opts, message",
    [
        (("MODEL.ROI_HEADS.NAME", "PANetROIHeads"), "ROI_HEADS.NAME is 'PANetROIHeads'; it must"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"), "be RotatedAnchorGenerator"),
        (("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"), "POOLER_TYPE is 'ROIAlignV2'"),
        (("MODEL.RPN.BBOX_REG_WEIGHTS", (1, 1, 1, 1)), "RPN.BBOX_REG_WEIGHTS is .* five numbers"),
        (("MODEL.MASK_ON", True), "MODEL.MASK_ON is True; it must be False"),
        (("TEST.AUG.ENABLED", True), "TEST.AUG.ENABLED is True"),
    ],
)
@pytest.mark.parametrize("backbone", ["build_resnet_fpn_backbone", "build_resnet_pafpn_backbone"])
def test_parts_for_upright_boxes(opts, message, backbone):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_cfg(*ORIENTED, "MODEL.BACKBONE.NAME", backbone, *opts))


def test_a_box_of_no_area_is_left_out(data):
    """And the others are used."""
    path, content = data
    content["annotations"][2]["bbox"][2] = 0
    problems = check_annotations(content)
    assert [(p.severity, p.what) for p in problems] == [("warning", "box of no area")]


def test_parts_of_a_user(monkeypatch):
    """Detectron2 takes any; what they need is not known here."""

    class OwnHeads(ROIHeads):
        def __init__(self, cfg, input_shape):
            super().__init__(**self.from_config(cfg))

    monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, "OwnHeads", OwnHeads)
    opts = ("MODEL.ROI_HEADS.NAME", "OwnHeads", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
    build_model(tiny_cfg(*ORIENTED, *opts))


def test_without_compiled_operators(monkeypatch):
    monkeypatch.setattr(
        "panet_d2.modeling.check_model.compiled_ops_error", lambda: "no module named _C"
    )
    with pytest.raises(ConfigError, match="'RRPN', which needs Detectron2's compiled .* named _C"):
        build_model(tiny_cfg(*ORIENTED))


def test_not_measured_for_planning(data, tmp_path):
    with pytest.raises(DataError, match="instances.json has oriented boxes"):
        read_fingerprint(data[0], str(tmp_path / "squares/images"))


def test_not_diagnosed(data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config("OUTPUT_DIR", str(tmp_path)).dump())
    with pytest.raises(ConfigError, match="'RRPN'; diagnose.py compares upright boxes"):
        load_script("tools/diagnose.py").main(["--config-file", str(path)])


@needs_rotated_ops
def test_trains_and_is_evaluated(data, tmp_path):
    cfg = config(
        *("OUTPUT_DIR", str(tmp_path / "out")),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        *("SOLVER.MAX_ITER", 2),
        *("SOLVER.STEPS", []),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("TEST.EVAL_PERIOD", 0),
    )
    setup_datasets(cfg)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train() or Trainer.test(cfg, trainer.model)
    assert 0 <= results["bbox"]["AP"] <= 100
    with open(tmp_path / "out/inference/coco_instances_results.json") as f:
        detections = json.load(f)
    assert detections and all(len(d["bbox"]) == 5 for d in detections)


@needs_rotated_ops
def test_perfect_detections_have_full_ap(data, tmp_path):
    cfg = config("OUTPUT_DIR", str(tmp_path / "out"))
    setup_datasets(cfg)
    evaluator = build_evaluator(cfg, "turned")
    evaluator.reset()
    for record in DatasetCatalog.get("turned"):
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = RotatedBoxes([a["bbox"] for a in record["annotations"]])
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(found))
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_demo_writes_five_numbers():
    demo = load_script("demo/demo.py")
    found = Instances((60, 90))
    found.pred_boxes = RotatedBoxes([[30.0, 20, 10, 5, 40]])
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    model = SimpleNamespace(category_ids=[7])
    (result,) = demo.Model.results(model, {"instances": found}, 1, "a.png")
    assert result["bbox"] == [30, 20, 10, 5, 40] and result["category_id"] == 7
