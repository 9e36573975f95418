#!/usr/bin/env python
"""Draw architecture.svg: ``python docs/figures/architecture.py``. It needs no other package."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import List

WIDTH, HEIGHT = 1000, 560
# Fill and outline: Detectron2's own parts, and the three parts of PANet.
STOCK, BPA, AFP, FF = (
    ("#eceff1", "#607d8b"),
    ("#e3f2fd", "#1565c0"),
    ("#fff3e0", "#e65100"),
    ("#e8f5e9", "#2e7d32"),
)
LEVELS = {5: 70, 4: 140, 3: 210, 2: 280}  # the height of each level's row
WIDTHS = {5: 44, 4: 56, 3: 70, 2: 84}
TALL = 36


def box(x: float, y: float, width: float, text: str, colors: tuple, tall: float = TALL) -> str:
    """A box with its text, around the point (x, y)."""
    fill, line = colors
    return (
        f'<rect x="{x - width / 2:g}" y="{y - tall / 2:g}" width="{width:g}" height="{tall:g}" '
        f'rx="5" fill="{fill}" stroke="{line}" stroke-width="1.5"/>' + label(x, y + 5, text)
    )


def label(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


def arrow(points: List[tuple], colors: tuple = STOCK, dashed: bool = False) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colors[1]}" stroke-width="1.6"{dash} '
        f'marker-end="url(#head)"/>'
    )


def plus(x: float, y: float, text: str, colors: tuple, radius: float = 17) -> str:
    fill, line = colors
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" stroke="{line}" '
        f'stroke-width="1.5"/>' + label(x, y + 5, text)
    )


def pyramids() -> List[str]:
    """ResNet, FPN and the bottom-up path, from left to right."""
    resnet, fpn, path = 60, 185, 320
    parts = [
        label(resnet, 30, "ResNet", style='class="title"'),
        label(fpn, 30, "FPN", style='class="title"'),
        label(path, 30, "Bottom-up path", style='class="title"'),
    ]
    for level, y in LEVELS.items():
        half = WIDTHS[level] / 2
        parts.append(box(resnet, y, WIDTHS[level], f"res{level}", STOCK))
        parts.append(box(fpn, y, WIDTHS[level], f"P{level}", STOCK))
        parts.append(box(path, y, WIDTHS[level], f"N{level}", BPA))
        parts.append(arrow([(resnet + half, y), (fpn - half - 3, y)]))
        parts.append(arrow([(fpn + half, y), (path - half - 3, y)], BPA))
        if level < 5:
            gap = (y - TALL / 2, LEVELS[level + 1] + TALL / 2)
            parts.append(arrow([(resnet, gap[0]), (resnet, gap[1] + 3)]))
            parts.append(arrow([(fpn, gap[1]), (fpn, gap[0] - 3)]))
            parts.append(arrow([(path, gap[0]), (path, gap[1] + 3)], BPA))
            parts.append(label(path + 8, sum(gap) / 2 + 5, "conv, stride 2", "start", SMALL))
    parts.append(label(fpn + 68, LEVELS[2] - 6, "same", style=SMALL))
    return parts


def pooling() -> List[str]:
    """Pooling from all levels, and the proposals."""
    x, fused = 490, (600, 175)
    parts = [
        label(515, 30, "Adaptive feature pooling", style='class="title"'),
        box(320, 350, 84, "RPN", STOCK),
        arrow([(320, LEVELS[2] + TALL / 2), (320, 350 - TALL / 2 - 3)]),
        arrow([(362, 350), (x, 350), (x, LEVELS[2] + TALL / 2 + 3)], dashed=True),
        label(427, 343, "proposals", style=SMALL),
        label(328, 320, "N2 to N6", "start", SMALL),
        label(600, 300, "one pooler for", style=SMALL),
        label(600, 316, "each head", style=SMALL),
        plus(*fused, "max", AFP, 22),
    ]
    for level, y in LEVELS.items():
        start = 320 + WIDTHS[level] / 2
        parts.append(box(x, y, 124, "RoIAlign, layer", AFP))
        parts.append(arrow([(start, y), (x - 65, y)], AFP))
        drop = {5: (-15, -19), 4: (-23, -8), 3: (-23, 8), 2: (-15, 19)}[level]
        parts.append(arrow([(x + 62, y), (fused[0] + drop[0], fused[1] + drop[1])], AFP))
    return parts


def heads() -> List[str]:
    """The box head, and the two paths of the mask head."""
    top, fcn, fc = 90, 210, 290
    parts = [
        label(690, 30, "Box head", "start", 'class="title"'),
        label(690, 165, "Mask head", "start", 'class="title"'),
        arrow([(617, 160), (650, top), (685, top)]),
        box(760, top, 140, "2fc or 4conv1fc", STOCK),
        arrow([(830, top), (893, top)]),
        label(900, top - 4, "class", "start"),
        label(900, top + 15, "box", "start"),
        arrow([(617, 190), (645, fcn), (657, fcn)]),
        box(690, fcn, 60, "2 convs", STOCK),
        arrow([(720, fcn), (747, fcn)]),
        box(775, fcn, 50, "conv", STOCK),
        arrow([(800, fcn), (817, fcn)]),
        box(850, fcn, 60, "deconv", STOCK),
        arrow([(880, fcn), (920, fcn)]),
        plus(938, fcn, "+", FF),
        arrow([(938, fcn - 17), (938, 172)]),
        label(938, 163, "mask"),
        arrow([(733, fcn), (733, fc), (747, fc)], FF),
        box(781, fc, 62, "2 convs", FF),
        arrow([(812, fc), (832, fc)], FF),
        box(855, fc, 40, "fc", FF),
        arrow([(875, fc), (938, fc), (938, fcn + 20)], FF),
        label(836, 330, "fully-connected path: one mask for all classes", style=SMALL),
        label(836, 246, "FCN path: one mask for each class", style=SMALL),
    ]
    return parts


def legend() -> List[str]:
    """Modules and config keys, a row for each part."""
    rows = (
        (BPA, "Bottom-up path augmentation", "PAFPN", "BACKBONE.NAME: build_resnet_pafpn_backbone"),
        (
            AFP,
            "Adaptive feature pooling",
            "AdaptiveROIPooler",
            "ROI_BOX_HEAD.AFP.ENABLED, ROI_MASK_HEAD.AFP.ENABLED: True",
        ),
        (FF, "Fully-connected fusion", "PANetMaskHead", "ROI_MASK_HEAD.FC_FUSION.ENABLED: True"),
        (STOCK, "As in Detectron2", "FastRCNNConvFCHead", "ROI_BOX_HEAD.NUM_CONV, NUM_FC"),
    )
    parts = []
    for x, title in ((48, "Part"), (270, "Module"), (460, "Config keys, below MODEL")):
        parts.append(label(x, 405, title, "start", 'class="title"'))
    for i, (colors, part, module, key) in enumerate(rows):
        y = 435 + 32 * i
        parts.append(box(30, y, 20, "", colors, 20))
        parts.append(label(48, y + 5, part, "start"))
        parts.append(label(270, y + 5, module, "start", MONO))
        parts.append(label(460, y + 5, key, "start", MONO))
    return parts


SMALL = 'class="small"'
MONO = 'class="mono"'
STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 15px; fill: #212121; }
.title { font-weight: bold; font-size: 16px; }
.small { font-size: 12px; fill: #455a64; }
.mono { font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13.5px; }
"""


def draw() -> str:
    """Return the figure as SVG."""
    parts = [*pyramids(), *pooling(), *heads(), *legend()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>PANet: FPN, bottom-up path, pooling from all levels, box and mask head</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="#455a64"/>'
            "</marker></defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw(), encoding="utf-8")
