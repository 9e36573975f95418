import json
import sys
from types import ModuleType

import numpy as np
import pytest
from detectron2 import evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.structures import BoxMode
from PIL import Image

from panet_d2.data import register_coco_file
from panet_d2.errors import ConfigError
from panet_d2.evaluation import build_evaluator, check_evaluators, inference_folder

from ..common import tiny_cfg, write_coco

MODULES = {
    "lvis": ("lvis", "lvis.eval"),
    "cityscapes_instance": (
        "cityscapesscripts",
        "cityscapesscripts.evaluation",
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
    ),
    "coco_panoptic_seg": ("panopticapi",),
}
MODULES["cityscapes_sem_seg"] = MODULES["cityscapes_instance"]


@pytest.fixture
def packages(monkeypatch):
    """All packages that evaluators need, written for an old NumPy."""
    modules = {name: ModuleType(name) for names in MODULES.values() for name in names}
    for name, module in modules.items():
        module.np, module.__path__ = np, []
        exec("def zeros(): return np.zeros(2, dtype=np.float)", vars(module))
        exec("def inside(): return np.in1d([[1, 2], [3, 4]], [2, 3])", vars(module))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("CITYSCAPES_DATASET", "")
    return modules


def test_unknown_evaluator_is_named_before_a_run():
    name = "cityscapes_fine_panoptic_val"
    with pytest.raises(ConfigError, match=f"{name}.*evaluator_type is 'cityscapes_panoptic_seg'"):
        check_evaluators(tiny_cfg("DATASETS.TEST", [name]))


@pytest.mark.parametrize("kind", MODULES)
def test_missing_package_is_named_before_a_run(monkeypatch, kind):
    package = MODULES[kind][0]
    for module in MODULES[kind]:
        monkeypatch.setitem(sys.modules, module, None)
    MetadataCatalog.get(f"needs_{kind}").set(evaluator_type=kind, gt_dir="a/b/c")
    for check in (check_evaluators, lambda cfg: build_evaluator(cfg, f"needs_{kind}")):
        if kind == "coco_panoptic_seg":
            for name in ("SemSegEvaluator", "COCOEvaluator"):
                monkeypatch.setattr(getattr(evaluation, name), "__init__", lambda *a, **k: None)
        with pytest.raises(ConfigError, match=f"'needs_{kind}'.*package {package} .*pip install "):
            check(tiny_cfg("DATASETS.TEST", [f"needs_{kind}"]))


@pytest.mark.parametrize("kind", ["lvis", "cityscapes_sem_seg"])
def test_old_package_works_with_new_numpy(packages, kind):
    had = {name: hasattr(np, name) for name in ("float", "in1d")}
    MetadataCatalog.get(f"old_{kind}").set(evaluator_type=kind, gt_dir="/data/gtFine/val")
    check_evaluators(tiny_cfg("DATASETS.TEST", [f"old_{kind}"]))
    module = packages[MODULES[kind][-1]]
    assert module.zeros().dtype == np.float64
    assert module.inside().tolist() == [False, True, True, False]
    assert module.np.linalg is np.linalg
    assert {name: hasattr(np, name) for name in ("float", "in1d")} == had


def test_lvis_is_evaluated(tmp_path):
    """With the real package."""
    pytest.importorskip("lvis")
    box = [10, 10, 24, 20]
    category = {"id": 1, "name": "cell", "synset": "cell", "synonyms": [], "frequency": "f"}
    image = {"id": 1, "height": 64, "width": 96, "neg_category_ids": []}
    image.update(not_exhaustive_category_ids=[], coco_url="http://x/val2017/1.jpg")
    content = {
        "images": [image],
        "categories": [{**category, "image_count": 1, "instance_count": 1}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 480}
            | {"segmentation": [[10, 10, 34, 10, 34, 30, 10, 30]]}
        ],
    }
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps(content))
    metadata = MetadataCatalog.get("tiny_lvis")
    metadata.set(evaluator_type="lvis", json_file=str(file), thing_classes=["cell"])
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), "tiny_lvis")
    evaluator.reset()
    found = {"image_id": 1, "category_id": 0, "bbox": box, "score": 0.9}
    evaluator._predictions = [{"image_id": 1, "instances": [found]}]
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_labels_are_read_with_any_numpy(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register("labels", lambda: [record])
    metadata = MetadataCatalog.get("labels")
    metadata.set(evaluator_type="sem_seg", stuff_classes=["a", "b"], ignore_label=255)
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), "labels")
    assert isinstance(evaluator, SemSegEvaluator)
    read = evaluator.sem_seg_loading_fn(record["sem_seg_file_name"], dtype=int)
    assert read.dtype == int and (read == labels).all()
    assert evaluator.sem_seg_loading_fn(record["sem_seg_file_name"]).dtype == np.uint8


def test_converted_dataset_is_not_that_of_an_earlier_run(tmp_path):
    objects = []
    record = {"file_name": "a.jpg", "image_id": 1, "height": 64, "width": 96}
    DatasetCatalog.register("by_function", lambda: [{**record, "annotations": list(objects)}])
    MetadataCatalog.get("by_function").set(evaluator_type="coco", thing_classes=["a"])
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    for number in (1, 2):
        box = [8 * number, 8, 20, 20]
        objects.append({"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0})
        assert len(build_evaluator(cfg, "by_function")._coco_api.anns) == number
        del MetadataCatalog.get("by_function").json_file  # as in another process


@pytest.mark.parametrize("detections, limit", [(50, 100), (100, 100), (400, 400), (-1, 100_000)])
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
def test_picked_by_type(monkeypatch, packages, kind, name):
    made, evaluator = [], getattr(evaluation, name)
    monkeypatch.setattr(evaluator, "__init__", lambda self, *args, **kwargs: made.append(args))
    MetadataCatalog.get(f"some_{kind}").set(evaluator_type=kind, gt_dir="a/b/c")
    assert type(build_evaluator(tiny_cfg(), f"some_{kind}")) is evaluator
    assert made == [(f"some_{kind}",)]


def test_panoptic_has_three(monkeypatch, packages):
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
