from .shapes import register_shapes

__all__ = ["register_shapes"]

register_shapes()
