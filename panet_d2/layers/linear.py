"""A linear layer with a norm."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """
    :class:`torch.nn.Linear`, followed by an optional norm: any norm of
    :func:`detectron2.layers.get_norm`.
    """

    def __init__(self, in_features: int, out_features: int, norm: Optional[nn.Module] = None):
        """
        Args:
            in_features, out_features (int): length of each input and output.
            norm (nn.Module or None): a norm of ``out_features`` channels.
        """
        super().__init__(in_features, out_features)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (Tensor): shape (M, in_features).

        Returns:
            Tensor: shape (M, out_features).
        """
        # Not super().forward, which TorchScript cannot compile.
        x = F.linear(x, self.weight, self.bias)
        if self.norm is not None:
            # Detectron2's norms expect NCHW.
            x = self.norm(x[:, :, None, None])[:, :, 0, 0]
        return x
