import torch
from detectron2.modeling import build_model

from experiments.benchmark.models import images, imitate_trained, set_score_threshold
from experiments.benchmark.tasks import inference, training_step

from ...common import tiny_cfg


def test_a_step_leaves_the_model_as_it_was():
    """With random weights gradients are huge, and any other step would change the detections."""
    torch.manual_seed(0)
    model, inputs = imitate_trained(build_model(tiny_cfg())), images(2, 64, 96)
    set_score_threshold(model, inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = len(inference(model, inputs[:1])()[0]["instances"])
    step = training_step(model, inputs)
    step()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(inference(model, inputs[:1])()[0]["instances"]) == found > 0
