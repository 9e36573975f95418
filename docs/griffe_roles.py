"""Sphinx roles of the docstrings, such as :func:`name`, as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            role = r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`"
            obj.docstring.value = re.sub(role, r"`\1`", obj.docstring.value)
