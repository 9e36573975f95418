"""Layers with independent weights for each level of a pyramid."""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import nn

Norm = Union[str, Callable[[int], nn.Module]]

# Device types on which a loop over the levels replaces one operator for all levels. Times of the
# loop, divided by the operator's (two cores of an Intel Xeon, 4 levels of 256 channels):
#   linear layers, 100 and 1000 boxes     forward 1.03, 1.00   backward 0.45, 0.88
#   convs, contiguous, 100 and 1000       forward 0.95, 1.02   backward 0.89, 1.00
#   convs, channels-last, 100 and 1000    forward 0.99, 1.08   backward 0.95, 1.02
# A batched product of the convs' unfolded maps took 2 to 4 times as long. Not measured: CUDA.
LOOP_ON = ("cpu",)

# Norms that treat each channel by itself: a single norm can serve all levels.
_CHANNELWISE = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


class LevelwiseConv2d(nn.Conv2d):
    """
    One 3x3 conv and one norm per level, with independent weights.

    The levels run as one grouped convolution. On the devices of :data:`LOOP_ON`, they run in a
    loop if the weights are contiguous.

    The first axis of every parameter and buffer holds ``out_channels`` entries of each level, in
    the order of the levels.
    """

    def __init__(self, in_channels: int, out_channels: int, levels: int, norm: Norm = ""):
        """
        Args:
            in_channels, out_channels (int): channels of each level.
            levels (int): number of levels.
            norm (str or callable): norm of each level, see :func:`detectron2.layers.get_norm`.
        """
        super().__init__(
            levels * in_channels,
            levels * out_channels,
            kernel_size=3,
            padding=1,
            groups=levels,
            bias=not norm,
        )
        self.norm = _levelwise_norm(norm, out_channels, levels)
        # fvcore's c2_msra_fill, as in the convs of Detectron2's heads. Level by level, because the
        # scale depends on the number of outputs.
        for weight in self.weight.detach().chunk(levels):
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.constant_(self.bias, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): shape (L, M, in_channels, h, w). A tensor with the memory order
                (M, h, w, L, in_channels) is not copied.

        Returns:
            Tensor: shape (L, M, out_channels, h, w).
        """
        # reshape, because in ONNX flatten fails if M is 0, and unflatten keeps the M of the
        # example.
        x = x.transpose(0, 1)
        x = x.reshape(x.shape[0], self.in_channels, x.shape[3], x.shape[4])
        if torch.jit.is_scripting():
            x = self._conv_forward(x, self.weight, self.bias)
        elif x.device.type in LOOP_ON and self.weight.is_contiguous():
            layers = _by_level(self.weight, self.bias, self.groups)
            parts = zip(x.chunk(self.groups, 1), layers)
            levels = [F.conv2d(part, *layer, padding=1) for part, layer in parts]
            if self.norm is None:
                return torch.stack(levels)
            x = torch.cat(levels, 1)
        else:
            x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        channels = self.out_channels // self.groups
        x = x.reshape(x.shape[0], self.groups, channels, x.shape[2], x.shape[3])
        return x.transpose(0, 1)


class LevelwiseLinear(nn.Module):
    """
    One linear layer and one norm per level, with independent weights.

    The levels run as one batched matrix product, or in a loop on the devices of :data:`LOOP_ON`.
    The layout of the parameters is that of :class:`LevelwiseConv2d`.
    """

    def __init__(self, in_features: int, out_features: int, levels: int, norm: Norm = ""):
        """
        Args:
            in_features, out_features (int): length of each level's input and output.
            levels (int): number of levels.
            norm (str or callable): norm of each level, see :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self.in_features, self.out_features, self.levels = in_features, out_features, levels
        self.weight = nn.Parameter(torch.empty(levels * out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(levels * out_features))
        self.norm = _levelwise_norm(norm, out_features, levels)
        # fvcore's c2_xavier_fill, as in the fc layers of Detectron2's heads.
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): shape (L, M, in_features).

        Returns:
            Tensor: shape (L, M, out_features).
        """
        # fvcore, which traces a model to count its operations, does not know baddbmm.
        if torch.jit.is_scripting():
            x = self._batched(x)
        elif x.device.type in LOOP_ON or torch.jit.is_tracing():
            layers = _by_level(self.weight, self.bias, self.levels)
            x = torch.stack([F.linear(part, *layer) for part, layer in zip(x.unbind(), layers)])
        else:
            x = self._batched(x)
        if self.norm is None:
            return x
        # Detectron2's norms expect NCHW. For reshape, see LevelwiseConv2d.
        x = x.transpose(0, 1)
        x = self.norm(x.reshape(x.shape[0], self.levels * self.out_features, 1, 1))[:, :, 0, 0]
        return x.reshape(x.shape[0], self.levels, self.out_features).transpose(0, 1)

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(self.levels, self.out_features, self.in_features)
        bias = self.bias.reshape(self.levels, 1, self.out_features)
        return torch.baddbmm(bias, x, weight.transpose(1, 2))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, levels={self.levels}"


def _by_level(
    weight: torch.Tensor, bias: Optional[torch.Tensor], levels: int
) -> Iterator[Tuple[torch.Tensor, Optional[torch.Tensor]]]:
    """Yield the weight and bias of each level."""
    return zip(weight.chunk(levels), [None] * levels if bias is None else bias.chunk(levels))


class _NormOfEachLevel(nn.ModuleList):
    def __init__(self, norms: Iterable[nn.Module]):
        super().__init__(norms)
        self.levels = len(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(x.chunk(self.levels, 1))
        for i, norm in enumerate(self):
            parts[i] = norm(parts[i])
        return torch.cat(parts, 1)


def _levelwise_norm(norm: Norm, channels: int, levels: int) -> Optional[nn.Module]:
    """Return one norm per level, as one module over the concatenated channels of all levels."""
    if not norm:
        return None
    if norm == "GN":
        single = get_norm(norm, channels)
        return nn.GroupNorm(levels * single.num_groups, levels * channels)
    if norm in _CHANNELWISE:
        return get_norm(norm, levels * channels)
    return _NormOfEachLevel(get_norm(norm, channels) for _ in range(levels))
