"""Detectron2's ROI heads with adaptive feature pooling before any of their branches."""

from __future__ import annotations

from typing import Callable, Dict

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, ROIHeads
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads

from ...config import read_choice
from ...errors import ConfigError, ExportError
from ..check_model import (
    TrainingNotice,
    check_model,
    heads_that_ask_for_afp,
    suppression_keys,
    warn_once,
)
from ..poolers import AdaptiveROIPooler
from .other_layers import drop_other_layers
from .suppression import SuppressionMixin


class AdaptivePoolingMixin(TrainingNotice, SuppressionMixin):
    """
    A mixin that adds adaptive feature pooling to any heads derived from :class:`StandardROIHeads`,
    for each branch whose ``AFP.ENABLED`` is True. Branches, losses and inference stay the parent's,
    except that ``TEST.SOFT_NMS`` and ``TEST.BOX_VOTING`` can replace NMS. Example::

        @ROI_HEADS_REGISTRY.register()
        class MyAdaptiveROIHeads(AdaptivePoolingMixin, MyROIHeads):
            pass
    """

    @classmethod
    def init_head(
        cls,
        parent: Callable[[CfgNode, Dict[str, ShapeSpec]], dict],
        cfg: CfgNode,
        input_shape: Dict[str, ShapeSpec],
        branch: str,
    ) -> dict:
        """Run the heads' own method and replace its pooler by an :class:`AdaptiveROIPooler`."""
        head = f"ROI_{branch.upper()}_HEAD"
        branch_on = branch == "box" or cfg.MODEL[f"{branch.upper()}_ON"]
        if not branch_on or not read_choice(cfg, f"MODEL.{head}.AFP.ENABLED", (True, False)):
            return super().init_head(parent, cfg, input_shape, branch)
        pooler = AdaptiveROIPooler(cfg, input_shape, head)
        # The parent sizes the head by the width of the levels and the pooler's resolution, so pass
        # the values after the adaptation layers. The parent's pooler has no parameters.
        shape = pooler.output_shape
        head_cfg = cfg.clone()
        head_cfg.defrost()
        head_cfg.MODEL[head].POOLER_RESOLUTION = shape.height
        head_input_shape = {
            f: ShapeSpec(channels=shape.channels, stride=input_shape[f].stride)
            for f in cfg.MODEL.ROI_HEADS.IN_FEATURES
        }
        ret = super().init_head(parent, head_cfg, head_input_shape, branch)
        ret[f"{branch}_pooler"] = pooler
        return ret

    def before_loading(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Drop heads with other layers. Here, because Detectron2's trainers load by name, too."""
        drop_other_layers(state_dict, {prefix + n: value for n, value in self.state_dict().items()})

    def __prepare_scriptable__(self) -> ROIHeads:
        """Return a copy for TorchScript; raise ExportError if the heads cannot be scripted."""
        stock = next((c for c in (CascadeROIHeads, RROIHeads) if isinstance(self, c)), None)
        if stock:
            raise ExportError(
                f"{type(self).__name__} cannot be scripted, because Detectron2's {stock.__name__} "
                "cannot; tools/export_model.py exports cascades by tracing."
            )
        if hasattr(self.box_predictor, "suppression"):
            raise ExportError("models with Soft-NMS or box voting cannot be scripted.")
        return self.without_hooks()


@ROI_HEADS_REGISTRY.register()
class PANetROIHeads(AdaptivePoolingMixin, StandardROIHeads):
    """
    :class:`StandardROIHeads` with adaptive feature pooling (PANet, Sec. 3.2) before the box, mask
    and keypoint branch. Each branch has its own switch. Without a config, pass an
    :class:`AdaptiveROIPooler` as any of the poolers.
    """


# For TorchScript. detectron2.export does the same for the parent on import. In the class body,
# these annotations would be text.
PANetROIHeads.__annotations__ = dict.fromkeys(("mask_on", "keypoint_on"), torch.jit.Final[bool])


@ROI_HEADS_REGISTRY.register()
class PANetCascadeROIHeads(AdaptivePoolingMixin, CascadeROIHeads):
    """
    :class:`CascadeROIHeads` with adaptive feature pooling before each branch. The stages share
    the box pooler, as in the parent, and therefore the pooler's adaptation layers.
    """


@ROI_HEADS_REGISTRY.register()
class PANetRROIHeads(AdaptivePoolingMixin, RROIHeads):
    """
    :class:`RROIHeads`, which find oriented boxes, with adaptive feature pooling before the box
    branch. These heads have no other branch.
    """


_stock_from_config = ROIHeads.from_config.__func__


# With *args, Detectron2 would pass arguments that override the config to this function only.
def _from_config(cls: type, cfg: CfgNode) -> dict:
    check_model(cfg)
    name, asked, suppression = (
        cfg.MODEL.ROI_HEADS.NAME,
        heads_that_ask_for_afp(cfg),
        suppression_keys(cfg),
    )
    if suppression and not issubclass(cls, SuppressionMixin):
        raise ConfigError(
            f"{suppression[0]} is True, but MODEL.ROI_HEADS.NAME is {name!r}, which has only NMS; "
            "set PANetROIHeads or PANetCascadeROIHeads, which are Detectron2's if AFP is not "
            "enabled, or add AdaptivePoolingMixin to your own heads."
        )
    if issubclass(cls, AdaptivePoolingMixin) and not asked and not suppression:
        warn_once(
            f"MODEL.ROI_HEADS.NAME is {name!r}, but no MODEL.ROI_*_HEAD.AFP.ENABLED is True, so "
            "there is no adaptive feature pooling."
        )
    if asked and not issubclass(cls, AdaptivePoolingMixin):
        warn_once(
            f"MODEL.{asked[0]}.AFP.ENABLED is True, but MODEL.ROI_HEADS.NAME is {name!r}, which "
            "has no adaptive feature pooling and ignores the key; set PANetROIHeads or "
            "PANetCascadeROIHeads, or add AdaptivePoolingMixin to your own heads."
        )
    return _stock_from_config(cls, cfg)


# All ROI heads run this method of the base class. With stock heads, backbone and trainer, no other
# code of this package sees the config.
ROIHeads.from_config = classmethod(_from_config)
