# PANet-2fc, from Detectron2's Mask R-CNN with FPN. As in Base-PANet-FPN.yaml: bottom-up path,
# adaptive feature pooling before both heads, fully-connected fusion.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from panet_d2 import PAFPN, AdaptiveROIPooler, PANetMaskHead, PANetROIHeads

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

model.backbone.update(_target_=PAFPN)
model.roi_heads.update(
    _target_=PANetROIHeads,
    # Each adaptation layer replaces the first layer of its head, so the head has one layer less.
    box_pooler=L(AdaptiveROIPooler)(
        output_size=7,
        scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
        sampling_ratio=2,
        pooler_type="ROIAlignV2",
        in_channels=256,
        fusion="max",
        adaptation="fc",
        adaptation_dim=1024,
    ),
    mask_pooler=L(AdaptiveROIPooler)(
        output_size=14,
        scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
        sampling_ratio=2,
        pooler_type="ROIAlignV2",
        in_channels=256,
        fusion="max",
        adaptation="conv",
        adaptation_dim=256,
    ),
    mask_head=L(PANetMaskHead)(
        input_shape=ShapeSpec(channels=256, width=14, height=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256],
    ),
)
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=1024, height=1, width=1), fc_dims=[1024]
)
