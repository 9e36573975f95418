from .export import FORMATS, check_exportable, export_model
from .verify import Agreement, sample_images

__all__ = ["FORMATS", "Agreement", "check_exportable", "export_model", "sample_images"]
