"""torch.compile of backbone and neck, in which all shapes follow from the image's."""

import pytest
import torch
from detectron2.modeling import build_model
from torch._dynamo.utils import counters

from ..common import tiny_cfg

# Not smaller: PyTorch compiles small convs anew, for which it chooses another memory format.
SIZES = ((256, 320), (320, 256), (352, 352))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_same_features_for_any_size(backend):
    torch._dynamo.reset()
    counters.clear()
    backbone = build_model(tiny_cfg()).backbone.eval()
    compiled = torch.compile(backbone, backend=backend, dynamic=True)
    for size in SIZES:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, found = backbone(image), compiled(image)
        assert list(found) == list(expected)
        for level, feature in expected.items():
            atol = 1e-5 * feature.abs().max().item()
            torch.testing.assert_close(found[level], feature, rtol=0, atol=atol)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
