from .export import FORMATS, ExportError, check_exportable, export_model
from .verify import Agreement, sample_images

__all__ = [
    "FORMATS",
    "Agreement",
    "ExportError",
    "check_exportable",
    "export_model",
    "sample_images",
]
