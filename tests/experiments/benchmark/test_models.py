import operator

import pytest
import torch

from experiments.benchmark.models import (
    HEADS,
    NaivePooler,
    build_models,
    images,
    part_times,
    set_score_threshold,
)
from panet_d2.modeling import AdaptiveROIPooler

from ...common import tiny_cfg


@pytest.fixture(scope="module", params=list(HEADS))
def models(request):
    cfg = tiny_cfg("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 1000)
    return request.param, build_models(cfg, request.param)


def test_models_have_the_parts_of_their_names(models):
    head, built = models
    stock = built["Mask R-CNN"]
    assert type(stock.backbone).__name__ == "FPN"
    assert type(stock.roi_heads).__name__ == "StandardROIHeads"
    layers = {"2fc": ["fc1", "fc2"], "4conv1fc": ["conv1", "conv2", "conv3", "conv4", "fc1"]}
    names = [name for name, _ in stock.roi_heads.box_head.named_children()]
    assert [n for n in names if n in layers[head]] == layers[head]
    assert isinstance(built["PANet"].roi_heads.box_pooler, AdaptiveROIPooler)
    assert isinstance(built["naive PANet"].roi_heads.box_pooler, NaivePooler)


def test_naive_panet_gives_the_same(models):
    """Both compute the same detections."""
    _, built = models
    x = images(1, 64, 96)
    with torch.no_grad():
        naive, ours = (built[n].eval()(x)[0]["instances"] for n in ("naive PANet", "PANet"))
    torch.testing.assert_close(naive.scores, ours.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        naive.pred_boxes.tensor, ours.pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )


def test_threshold_lets_detections_through(models):
    _, built = models
    model, x = built["PANet"], images(1, 64, 96)
    model.roi_heads.box_predictor.test_score_thresh = 0.99
    with torch.no_grad():
        assert len(model.eval()(x)[0]["instances"]) == 0
        set_score_threshold(model, x)
        assert len(model(x)[0]["instances"]) > 0


def test_counts_are_those_of_a_trained_model(models):
    """Every model has as many proposals as the config allows, of all sizes."""
    _, built = models
    for model in built.values():
        seen = []
        generator = model.proposal_generator
        hook = generator.register_forward_hook(lambda *args, seen=seen: seen.append(args[2][0][0]))
        with torch.no_grad():
            model.eval()(images(1, 128, 128))
        hook.remove()
        sizes = seen[0].proposal_boxes.area().sqrt()
        # 200 from each of the two finest levels, and all anchors of the three others
        assert len(sizes) == 2 * 200 + 3 * (8 * 8 + 4 * 4 + 2 * 2)
        assert sizes.max() > 2 * sizes.min()


def test_parts_of_a_model(models):
    head, built = models
    for name, model in built.items():
        set_score_threshold(model, images(1, 64, 96))
        with torch.no_grad(), part_times(model, "cpu") as times:
            model.eval()(images(1, 64, 96))
        parts = {"other", "post-processing", "neck", "backbone", "RPN", "heads", "pooling"}
        assert times.seconds.keys() == parts | ({"adaptation"} if "PANet" in name else set())
        assert all(seconds > 0 for seconds in times.seconds.values())


@pytest.mark.parametrize(
    "name, fusion", [("naive PANet", "torch.Tensor.amax"), ("PANet", "torch.maximum")]
)
def test_relu_and_fusion_are_adaptation(models, monkeypatch, name, fusion):
    """In both, so that their rows compare."""
    model, seen = models[1][name], []
    set_score_threshold(model, images(1, 64, 96))
    with torch.no_grad(), part_times(model, "cpu") as times:
        for target in (fusion, "torch.Tensor.relu"):
            real = operator.attrgetter(target.partition(".")[2])(torch)

            def spy(*args, real=real, **kwargs):
                seen.append(times._open[-1][0])
                return real(*args, **kwargs)

            monkeypatch.setattr(target, spy)
        model.eval()(images(1, 64, 96))
    assert seen and set(seen) == {"adaptation"}


def test_training_inputs(models):
    _, built = models
    x = images(2, 64, 96, objects=3)
    assert [len(i["instances"]) for i in x] == [3, 3]
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = built["PANet"].train()(x)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_naive_pooler_is_for_what_the_benchmark_builds():
    pooler = AdaptiveROIPooler(7, [1 / 4], 2, "ROIAlignV2", in_channels=2, fusion="sum")
    with pytest.raises(ValueError, match="'sum'"):
        NaivePooler(pooler)
