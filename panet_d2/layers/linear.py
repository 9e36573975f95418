"""A linear layer that carries its norm, as Detectron2's ``Conv2d`` does."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Linear"]


class Linear(nn.Linear):
    """
    :class:`torch.nn.Linear` followed by an optional norm.

    It is to ``nn.Linear`` what :class:`detectron2.layers.Conv2d` is to ``nn.Conv2d``, so that a
    fully-connected layer can have any norm that :func:`detectron2.layers.get_norm` makes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        norm: Optional[nn.Module] = None,
    ):
        """
        Args:
            in_features (int): length of each input.
            out_features (int): length of each output.
            bias (bool): whether to add a bias before the norm.
            norm (nn.Module or None): a norm of ``out_features`` channels.
        """
        super().__init__(in_features, out_features, bias=bias)
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
