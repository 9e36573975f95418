"""
Public names for all private names of Detectron2 that this package uses.

All of them exist in Detectron2 0.6, in its main branch of August 2024 and of June 2026.
"""

from __future__ import annotations

import copy
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Tuple,
)

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

# The defaults that get_cfg() copies.
from detectron2.config.defaults import _C as default_config  # noqa: F401
from detectron2.data import DatasetMapper

# Returns the arguments of build_detection_train_loader for a config. The public function also
# builds the loader, but sampler and dataset must be replaced before that.
from detectron2.data.build import _train_loader_from_config as train_loader_from_config  # noqa: F401
from detectron2.data.transforms import TransformList
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA

# Repeats sizes or ratios for each level.
from detectron2.modeling.anchor_generator import _broadcast_params as broadcast_params  # noqa: F401
from detectron2.structures import Instances

# For type checkers, each mixin below derives from the class that it extends.
if TYPE_CHECKING:
    from detectron2.engine import SimpleTrainer as _Loop
    from detectron2.modeling import StandardROIHeads as _ROIHeads
else:
    _Loop = _ROIHeads = object


def compiled_ops_error() -> str:
    """Return why Detectron2's compiled operators cannot be used; "" if they can."""
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError as e:
        return str(e)
    return ""


def restart_precise_bn(hook: hooks.PreciseBN) -> None:
    """Make the hook start at its loader's first batch again. Detectron2 keeps the iterator."""
    hook._data_iter = None


class LoadHooks(DetectionCheckpointer):
    """A checkpointer whose loading steps can be overridden. Only these steps raise and report."""

    path_manager: Any

    def read_file(self, filename: str) -> Dict[str, Any]:
        """Return what a local file holds."""
        return super()._load_file(filename)

    def read_torch_file(self, filename: str) -> Any:
        """Return what a local file of :func:`torch.save` holds; part of :meth:`read_file`."""
        return super()._torch_load(filename)

    def load_weights(self, checkpoint: Dict[str, Any]) -> Any:
        """Load ``checkpoint["model"]``; return fvcore's account of what did not match."""
        return super()._load_model(checkpoint)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        return self.read_file(filename)

    def _torch_load(self, filename: str) -> Any:
        return self.read_torch_file(filename)

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        return self.load_weights(checkpoint)


def forget_address(checkpointer: DetectionCheckpointer) -> None:
    """Forget the address of a checkpoint that could not be loaded, so that another can be."""
    if hasattr(checkpointer, "_parsed_url_during_load"):
        checkpointer._parsed_url_during_load = None


class AnnotationHook(DatasetMapper):
    """A mapper whose step from annotations to instances can be overridden."""

    def transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: Tuple[int, int]
    ) -> None:
        """Replace "annotations" in ``dataset_dict`` by "instances"."""
        super()._transform_annotations(dataset_dict, transforms, image_shape)

    def _transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: Tuple[int, int]
    ) -> None:
        self.transform_annotations(dataset_dict, transforms, image_shape)


class LossHook(_Loop):
    """A mixin for training loops that sees the losses of each process, not only their mean."""

    def check_losses(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Called with the losses of each step, on the CPU, before processes average them."""

    def _write_metrics(
        self, loss_dict: Mapping[str, torch.Tensor], data_time: float, *args: Any, **kwargs: Any
    ) -> None:
        # The parent copies the losses to the CPU, too. With these copies, the GPU waits only once.
        losses = {name: loss.detach().cpu() for name, loss in loss_dict.items()}
        self.check_losses(losses)
        super()._write_metrics(losses, data_time, *args, **kwargs)


class TrainingLoop(DefaultTrainer):
    """A :class:`DefaultTrainer` with a public name for its inner loop (loader and model)."""

    @property
    def loop(self) -> SimpleTrainer:
        return self._trainer

    @loop.setter
    def loop(self, loop: SimpleTrainer) -> None:
        self._trainer = loop


class HeadHooks(_ROIHeads):
    """
    A mixin for ROI heads with three methods to override: :meth:`init_head` for the three
    ``_init_*_head``, which can replace a pooler, :meth:`forward_box` for the step from proposals
    to boxes, and :meth:`before_loading`.
    """

    @classmethod
    def init_head(
        cls,
        parent: Callable[[CfgNode, Dict[str, ShapeSpec]], dict],
        cfg: CfgNode,
        input_shape: Dict[str, ShapeSpec],
        branch: str,
    ) -> dict:
        """Return the constructor's arguments for one branch: "box", "mask" or "keypoint"."""
        return parent(cfg, input_shape)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> dict:
        return cls.init_head(super()._init_box_head, cfg, input_shape, "box")

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> dict:
        return cls.init_head(super()._init_mask_head, cfg, input_shape, "mask")

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> dict:
        return cls.init_head(super()._init_keypoint_head, cfg, input_shape, "keypoint")

    def before_loading(self, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Called with weights before they are loaded by name; may change the dict in place."""

    def _load_from_state_dict(
        self, state_dict: Dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        self.before_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward_box(
        self,
        features: Dict[str, torch.Tensor],
        proposals: List[Instances],
        *targets: Optional[List[Instances]],
    ) -> Any:
        """Return the losses in training, else the detections of each image without masks."""
        return super()._forward_box(features, proposals, *targets)

    def _forward_box(
        self,
        features: Dict[str, torch.Tensor],
        proposals: List[Instances],
        *targets: Optional[List[Instances]],
    ) -> Any:
        return self.forward_box(features, proposals, *targets)

    def without_hooks(self) -> _ROIHeads:
        """Return a copy without :meth:`forward_box`. TorchScript cannot compile ``super()``."""
        stock = {"_forward_box": super(HeadHooks, type(self))._forward_box}
        ret = copy.copy(self)
        ret.__class__ = type(type(self).__name__, (type(self),), stock)
        return ret


class TTAHooks(GeneralizedRCNNWithTTA):
    """Test-time augmentation whose steps have names and can be overridden."""

    def infer_image(self, image: dict) -> dict:
        """Return the output for one image."""
        return super()._inference_one_image(image)

    def batch_inference(
        self, inputs: List[dict], instances: Optional[List[Instances]] = None
    ) -> List[Instances]:
        """Run the model on views without postprocessing, on the boxes of ``instances`` if given."""
        return super()._batch_inference(inputs, instances)

    def into_views(
        self, inputs: List[dict], found: Instances, transforms: List[TransformList]
    ) -> List[Instances]:
        """Return the detections of the image with their boxes in pixels of each view."""
        return super()._rescale_detected_boxes(inputs, found, transforms)

    def _inference_one_image(self, input: dict) -> dict:
        return self.infer_image(input)

    def _batch_inference(
        self, batched_inputs: List[dict], detected_instances: Optional[List[Instances]] = None
    ) -> List[Instances]:
        return self.batch_inference(batched_inputs, detected_instances)
