import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator

from panet_d2.engine import read_config
from panet_d2.planning.anchors import anchor_strides

from ..common import ROOT

RELEASES = sorted(ROOT.glob("configs/*/release_*.yaml"))
# Width and height by stride, of sizes of 8 strides and the ratios 0.5, 1, 2, computed by hand:
# 4 / sqrt(0.5) = 5.66 -> 6, 6 * 0.5 = 3; 4 / sqrt(2) = 2.83 -> 3, 3 * 2 = 6; all times 8.
SIZES = {
    4: [(48, 24), (32, 32), (24, 48)],
    8: [(88, 48), (64, 64), (48, 96)],  # 5.5 -> 6, to the even number
    16: [(184, 96), (128, 128), (88, 176)],
    32: [(360, 176), (256, 256), (184, 368)],  # 22.5 -> 22
    64: [(728, 368), (512, 512), (360, 720)],  # 45.5 -> 46
}


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_anchors_of_the_release(path):
    cfg = read_config(str(path))
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in SIZES])
    for cells, sizes in zip(generator.cell_anchors, SIZES.values()):
        assert torch.equal(cells[:, 2:] - cells[:, :2], torch.tensor(sizes).float())
        assert torch.equal(cells[:, :2], -cells[:, 2:])
    assert anchor_strides(cfg) == list(SIZES)


def test_centers_are_in_the_middle_of_the_cells():
    """Detectron's are (stride - 1) / 2, and its boxes contain their last pixel."""
    cfg = read_config(str(RELEASES[0]))
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in SIZES])
    anchors = generator([torch.zeros(1, 1, 2, 2)] * 5)
    for stride, boxes in zip(SIZES, anchors):
        centers = boxes.get_centers().view(2, 2, 3, 2)
        assert torch.equal(centers[0, 0], torch.full((3, 2), stride / 2))
        assert torch.equal(centers[1, 1], torch.full((3, 2), 1.5 * stride))
