"""The rungs of the paper's ablation, as overrides of a Mask R-CNN's config."""

from __future__ import annotations

from typing import Dict, FrozenSet, List, Optional, Sequence

__all__ = ["GROUPS", "LADDER", "PARTS", "RUNGS", "Rung", "overrides"]

# In the order of the paper's Table 3.
PARTS: Dict[str, str] = {
    "mst": "multi-scale training",
    "norm": "norms, trained along",
    "bpa": "bottom-up path augmentation",
    "afp": "adaptive feature pooling",
    "ff": "fully-connected fusion",
    "hhd": "heavier box head",
}
_ALL = frozenset(PARTS)
_IDEAS = frozenset(["bpa", "afp", "ff"])
_AFP_KEYS = tuple(f"MODEL.ROI_{head}_HEAD.AFP" for head in ("BOX", "MASK"))


class Rung:
    """One model of the ablation."""

    def __init__(
        self,
        title: str,
        parts: FrozenSet[str],
        fusion: str = "max",
        fuse_first: bool = False,
        compared_with: str = "",
    ):
        """
        Args:
            title (str): for tables.
            parts (set[str]): the keys of :data:`PARTS` that the model has.
            fusion (str): fusion of the levels, read with "afp" only.
            fuse_first (bool): fuse before the first layer of the heads instead of after it.
            compared_with (str): name of the rung that tables and plots compare this one with.
        """
        self.title = title
        self.parts = parts
        self.fusion = fusion
        self.fuse_first = fuse_first
        self.compared_with = compared_with


def _ladder() -> Dict[str, Rung]:
    rungs = {"baseline": Rung("Mask R-CNN", frozenset())}
    parts: List[str] = []
    for part in PARTS:
        previous = list(rungs)[-1]
        parts.append(part)
        rungs[f"+{part}"] = Rung(f"+ {PARTS[part]}", frozenset(parts), compared_with=previous)
    return rungs


LADDER: Dict[str, Rung] = _ladder()
_FULL = list(LADDER)[-1]
LADDER[_FULL].title += " = full PANet"

GROUPS: Dict[str, Dict[str, Rung]] = {
    "ladder": LADDER,
    "alone": {
        f"only_{part}": Rung(f"only {title}", frozenset([part]), compared_with="baseline")
        for part, title in PARTS.items()
    },
    "without": {
        f"no_{part}": Rung(f"full PANet without {title}", _ALL - {part}, compared_with=_FULL)
        for part, title in PARTS.items()
    },
    "layers": {"bpa_afp": Rung("BPA and AFP", _IDEAS - {"ff"}, compared_with="only_bpa")},
    # The paper's changes to the layers, without those to training and without the heavier box head.
    "ideas": {
        "ideas": Rung("BPA, AFP and FF", _IDEAS, compared_with="baseline"),
        "heavy_ideas": Rung(
            "BPA, AFP and FF, with the heavier box head",
            _IDEAS | {"hhd"},
            compared_with="only_hhd",
        ),
        "normed_ideas": Rung(
            "BPA, AFP and FF, with norms", _IDEAS | {"norm"}, compared_with="only_norm"
        ),
    },
    "fusion": {
        f"{'before' if before else 'after'}_{fusion}": Rung(
            f"{fusion} {'before' if before else 'after'} the first layer",
            _ALL,
            fusion,
            before,
            compared_with=_FULL,
        )
        for before in (False, True)
        for fusion in ("max", "sum", "mean", "product")
        if before or fusion != "max"  # full PANet has max after the first layer
    },
}

RUNGS: Dict[str, Rung] = {name: rung for group in GROUPS.values() for name, rung in group.items()}


def overrides(
    rung: Rung,
    norm: str = "GN",
    resnet_norm: Optional[str] = None,
    scales: Sequence[int] = (192, 224, 256, 288, 320),
    conv_dim: int = 64,
) -> List:
    """
    Args:
        rung (Rung): the model.
        norm (str): the norm that "norm" adds to neck and heads: "SyncBN" on several GPUs, as in
            the paper, "GN" on one.
        resnet_norm (str): the norm of a pretrained ResNet. With "norm" it is trained, as in the
            paper; without "norm" it is frozen. None keeps the config's norm, for a ResNet from
            scratch.
        scales (sequence[int]): shorter sides of the training images. "mst" draws one of them for
            each batch. Multiples of the neck's stride need no padding, which GroupNorm's
            statistics would include.
        conv_dim (int): channels of the convs of the heavier box head.

    Returns:
        list: KEY VALUE KEY VALUE …, overrides for the config of a Mask R-CNN with a 2fc box head.
    """
    has = rung.parts.__contains__
    opts: Dict[str, object] = {}
    if has("mst"):
        opts["INPUT.MIN_SIZE_TRAIN"] = list(scales)
        opts["INPUT.SAME_SIZE_PER_BATCH"] = True
    if resnet_norm:
        opts["MODEL.RESNETS.NORM"] = resnet_norm if has("norm") else "FrozenBN"
    opts["MODEL.FPN.NORM"] = norm if has("norm") else ""
    opts["MODEL.ROI_BOX_HEAD.NORM"] = norm if has("norm") else ""
    opts["MODEL.ROI_MASK_HEAD.NORM"] = norm if has("norm") else ""
    # The release has a norm after both layers of its 2fc head, but none after the fc layer that
    # follows four convs.
    if has("norm") and not has("hhd"):
        opts["MODEL.ROI_BOX_HEAD.NAME"] = "FastRCNNConvFCNormHead"
    if has("bpa"):
        opts["MODEL.BACKBONE.NAME"] = "build_resnet_pafpn_backbone"
    # With fusion after the first layer of a head, the adaptation layer replaces that layer.
    moved = 1 if has("afp") and not rung.fuse_first else 0
    convs, fcs = (4, 1) if has("hhd") else (0, 2)
    opts["MODEL.ROI_BOX_HEAD.NUM_CONV"] = convs - moved if convs else 0
    opts["MODEL.ROI_BOX_HEAD.NUM_FC"] = fcs if convs else fcs - moved
    opts["MODEL.ROI_MASK_HEAD.NUM_CONV"] = 4 - moved
    if has("hhd"):
        opts["MODEL.ROI_BOX_HEAD.CONV_DIM"] = conv_dim
    if has("afp"):
        opts["MODEL.ROI_HEADS.NAME"] = "PANetROIHeads"
        for key in _AFP_KEYS:
            opts[f"{key}.ENABLED"] = True
            opts[f"{key}.FUSION"] = rung.fusion
            opts[f"{key}.ADAPTATION"] = "none" if rung.fuse_first else "conv"
        if not convs and not rung.fuse_first:
            opts["MODEL.ROI_BOX_HEAD.AFP.ADAPTATION"] = "fc"
    if has("ff"):
        opts["MODEL.ROI_MASK_HEAD.NAME"] = "PANetMaskHead"
    return [part for pair in opts.items() for part in pair]
