from .build import build_evaluator
from .matching import ImageMatch, average_precision, match_predictions
from .pictures import draw_comparison

__all__ = [
    "ImageMatch",
    "average_precision",
    "build_evaluator",
    "draw_comparison",
    "match_predictions",
]
