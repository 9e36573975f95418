import pytest
import torch
from detectron2.layers import get_norm

from panet_d2.layers import Linear


@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN", "naiveSyncBN", "FrozenBN", "LN"])
def test_is_a_1x1_conv(norm):
    torch.manual_seed(0)
    layer = Linear(6, 64, norm=get_norm(norm, 64)).train()
    x = torch.randn(9, 6)
    conv = torch.nn.functional.conv2d(
        x[:, :, None, None], layer.weight[:, :, None, None], layer.bias
    )
    expected = conv if layer.norm is None else layer.norm(conv)
    torch.testing.assert_close(layer(x), expected[:, :, 0, 0])
    assert layer(x[:0]).shape == (0, 64)
