"""The Markdown that a reader meets, and its parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, List

from ..common import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(markdown: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", markdown, flags=re.DOTALL | re.MULTILINE)


def code_blocks(path: Path, language: str) -> List[str]:
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^\1```$", path.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def sentences(markdown: str) -> Iterator[str]:
    """
    The sentences of paragraphs, items of lists, and cells of tables, in which a
    semicolon parts the items of a list. Code is one word.
    """
    text = re.sub(r"<!--.*?-->", "", without_code(markdown), flags=re.DOTALL)
    blocks = [""]
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("|"):
            blocks += [item.strip() for item in re.split("[|;]", line.strip("|"))] + [""]
        elif re.match(r"#|[-*] |\d+\. |:::", line) or not line:
            blocks.append(line)
        else:
            blocks[-1] += f" {line}"
    for block in blocks:
        block = re.sub(r"`[^`]*`", "code", block)
        block = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", block)
        yield from re.split(r"(?<=[.!?])[\"*)]* +", block)


def table(markdown: str, heading: str) -> List[List[str]]:
    """The rows of the first table after a line that starts with ``heading``, without its head."""
    _, _, text = markdown.partition(f"\n{heading}")
    rows = re.search(r"^\|.*(?:\n\|.*)*", text, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows[2:]]
