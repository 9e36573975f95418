from .history import evaluations, losses, read_history
from .inspection import (
    dead_units,
    detection_stages,
    evaluate_boxes_of,
    evaluate_true_boxes,
    level_shares,
    mask_paths,
)
from .matching import (
    RESULTS,
    ImageMatch,
    average_precision,
    ground_truth,
    match_predictions,
    object_recall,
    precision_recall,
    read_results,
)
from .pictures import annotation_mask, draw_comparison
from .plots import draw_mask_paths, plot_level_shares, plot_precision_recall, plot_training

__all__ = [
    "RESULTS",
    "ImageMatch",
    "annotation_mask",
    "average_precision",
    "dead_units",
    "detection_stages",
    "draw_comparison",
    "draw_mask_paths",
    "evaluate_boxes_of",
    "evaluate_true_boxes",
    "evaluations",
    "ground_truth",
    "level_shares",
    "losses",
    "mask_paths",
    "match_predictions",
    "object_recall",
    "plot_level_shares",
    "plot_precision_recall",
    "plot_training",
    "precision_recall",
    "read_history",
    "read_results",
]
