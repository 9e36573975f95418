"""That Detectron2's private names stand in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import panet_d2

PACKAGE = Path(panet_d2.__file__).parent
FILES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "_detectron2.py")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_private_name_of_others(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in parts if is_private(name) and name != "_detectron2"]
            assert not private, f"line {node.lineno}: {private}"
        # super()._name and self.other._name reach into what another class has made.
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) or node.attr == "_replace"  # a named tuple
            assert own, f"line {node.lineno}: {ast.unparse(node)}"
