"""A plan as the text of a config file."""

from __future__ import annotations

import textwrap
from typing import Any, Dict, List

import yaml

from ..check_config import flatten
from .plan import Plan, plain
from .rules import Choice

_COLUMNS = 100


def config_text(plan: Plan, base: str, header: str) -> str:
    """
    Write the keys of a plan that differ from its base, each with its reason as a comment.

    Args:
        plan (Plan): the plan.
        base (str): the value of ``_BASE_``.
        header (str): comment at the top.

    Returns:
        str: YAML that Detectron2 reads.
    """
    tree: Dict[str, Any] = {}
    for key in (k for k, _ in flatten(plan.cfg) if k in plan.changed):  # Detectron2's order
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = plan.changed[key]
    lines = [*_comment(header, ""), f"_BASE_: {_scalar(base)}", *_lines(tree, "")]
    return "\n".join([*lines, f"VERSION: {plan.cfg.VERSION}", ""])


def _lines(tree: Dict[str, Any], indent: str) -> List[str]:
    lines: List[str] = []
    for key, value in tree.items():
        if not isinstance(value, Choice):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
            continue
        line = f"{indent}{key}: {_scalar(value.value)}"
        entries: List[str] = []
        rows = isinstance(value.value, (list, tuple)) and value.value
        if rows and all(isinstance(v, (list, tuple)) for v in rows) and len(line) > _COLUMNS:
            line = f"{indent}{key}:"
            entries = [f"{indent}  - {_scalar(v)}" for v in rows]
        beside = f"{line}  # {value.reason}"
        if len(beside) <= _COLUMNS:
            lines.append(beside)
        else:
            lines += [*_comment(value.reason, indent), line]
        lines += entries
    return lines


def _comment(text: str, indent: str) -> List[str]:
    prefix = f"{indent}# "
    return [
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(
            paragraph,
            _COLUMNS,
            initial_indent=prefix,
            subsequent_indent=prefix,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _scalar(value: Any) -> str:
    """Return a value as one line of YAML, without the document end mark."""
    text = yaml.safe_dump(
        plain(value), default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.rsplit("\n...\n", 1)[0].rstrip("\n")
