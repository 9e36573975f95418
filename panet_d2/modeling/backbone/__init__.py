from .pafpn import PAFPN, build_resnet_pafpn_backbone, build_retinanet_resnet_pafpn_backbone

__all__ = ["PAFPN", "build_resnet_pafpn_backbone", "build_retinanet_resnet_pafpn_backbone"]
