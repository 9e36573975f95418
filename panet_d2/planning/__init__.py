from .anchors import anchor_overlaps, anchor_recall, share_above
from .config_text import config_text
from .fingerprint import Fingerprint, measure, read_fingerprint, similar_files
from .hardware import Hardware
from .plan import Plan, make_plan
from .report import fingerprint_table, plot_plan, prediction_table

__all__ = [
    "Fingerprint",
    "Hardware",
    "Plan",
    "anchor_overlaps",
    "anchor_recall",
    "config_text",
    "fingerprint_table",
    "make_plan",
    "measure",
    "plot_plan",
    "prediction_table",
    "read_fingerprint",
    "share_above",
    "similar_files",
]
