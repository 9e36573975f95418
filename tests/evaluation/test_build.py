import pytest
from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from panet_d2.data import register_coco_file
from panet_d2.errors import ConfigError
from panet_d2.evaluation import build_evaluator, check_evaluators, inference_folder

from ..common import tiny_cfg, write_coco


@pytest.mark.parametrize("detections, limit", [(50, 100), (100, 100), (400, 400)])
def test_limit_follows_the_config(tmp_path, detections, limit):
    register_coco_file("evaluated", *write_coco(tmp_path))
    cfg = tiny_cfg("TEST.DETECTIONS_PER_IMAGE", detections, "OUTPUT_DIR", str(tmp_path))
    evaluator = build_evaluator(cfg, "evaluated")
    assert isinstance(evaluator, COCOEvaluator)
    assert evaluator._max_dets_per_image[-1] == limit


def test_keypoint_sigmas_are_the_configs(tmp_path):
    register_coco_file("evaluated", *write_coco(tmp_path))
    cfg = tiny_cfg("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2], "OUTPUT_DIR", str(tmp_path))
    assert list(build_evaluator(cfg, "evaluated")._kpt_oks_sigmas) == [0.1, 0.2]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("lvis", "LVISEvaluator"),
        ("cityscapes_instance", "CityscapesInstanceEvaluator"),
        ("cityscapes_sem_seg", "CityscapesSemSegEvaluator"),
        ("pascal_voc", "PascalVOCDetectionEvaluator"),
        ("sem_seg", "SemSegEvaluator"),
    ],
)
def test_picked_by_type(monkeypatch, kind, name):
    made, evaluator = [], getattr(evaluation, name)
    monkeypatch.setattr(evaluator, "__init__", lambda self, *args, **kwargs: made.append(args))
    MetadataCatalog.get(f"some_{kind}").evaluator_type = kind
    assert type(build_evaluator(tiny_cfg(), f"some_{kind}")) is evaluator
    assert made == [(f"some_{kind}",)]


def test_panoptic_has_three(monkeypatch):
    expected = ["SemSegEvaluator", "COCOEvaluator", "COCOPanopticEvaluator"]
    made = {}
    for name in expected:
        evaluator = getattr(evaluation, name)
        monkeypatch.setattr(
            evaluator, "__init__", lambda self, *a, _n=name, **k: made.update({_n: k})
        )
    MetadataCatalog.get("some_panoptic").evaluator_type = "coco_panoptic_seg"
    parts = build_evaluator(tiny_cfg("OUTPUT_DIR", "run"), "some_panoptic")._evaluators
    assert [type(part).__name__ for part in parts] == list(made) == expected
    assert all(options["output_dir"] == "run/inference" for options in made.values())
    assert made["COCOEvaluator"]["max_dets_per_image"] == 100


def test_each_of_several_datasets_has_its_folder(tmp_path):
    """Or the results of the last would lie where those of the first are looked for."""
    names = ["evaluated_first", "evaluated_second"]
    for name in names:
        register_coco_file(name, *write_coco(tmp_path / name))
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", names)
    for name in names:
        folder = inference_folder(cfg, name)
        assert folder == str(tmp_path / "inference" / name)
        assert build_evaluator(cfg, name)._output_dir == folder
        tta = build_evaluator(cfg, name, str(tmp_path / "inference_TTA"))
        assert tta._output_dir == str(tmp_path / "inference_TTA" / name)
    cfg.DATASETS.TEST = names[:1]  # as Detectron2 has it
    assert build_evaluator(cfg, names[0])._output_dir == str(tmp_path / "inference")
    assert inference_folder(cfg, names[0]) == str(tmp_path / "inference")


def test_keypoints_need_a_sigma_each(tmp_path):
    """COCO's evaluation knows those of its own 17."""
    register_coco_file("evaluated", *write_coco(tmp_path))
    opts = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5)
    opts += ("DATASETS.TEST", ["evaluated"])
    with pytest.raises(ConfigError, match="TEST.KEYPOINT_OKS_SIGMAS has 17 .* must have 5"):
        check_evaluators(tiny_cfg(*opts))
    with pytest.raises(ConfigError, match="TEST.KEYPOINT_OKS_SIGMAS has 4 .* must have 5"):
        check_evaluators(tiny_cfg(*opts, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 4))
    check_evaluators(tiny_cfg(*opts, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 5))
    check_evaluators(tiny_cfg(*opts, "MODEL.KEYPOINT_ON", False))
    check_evaluators(tiny_cfg(*opts, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17))


def test_unknown_type():
    MetadataCatalog.get("some_oddity").evaluator_type = "oddity"
    with pytest.raises(ConfigError, match="'some_oddity'.*'oddity'.*coco, "):
        build_evaluator(tiny_cfg(), "some_oddity")


def test_all_are_checked_before_a_run(tmp_path):
    register_coco_file("evaluated", *write_coco(tmp_path))
    MetadataCatalog.get("some_other_oddity").evaluator_type = "oddity"
    check_evaluators(tiny_cfg("DATASETS.TEST", []))
    check_evaluators(tiny_cfg("DATASETS.TEST", ["evaluated"]))
    with pytest.raises(ConfigError, match="'some_other_oddity'.*'oddity'.*, pascal_voc"):
        check_evaluators(tiny_cfg("DATASETS.TEST", ["evaluated", "some_other_oddity"]))
