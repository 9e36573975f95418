"""
What ``make docs`` adds to the pages of this folder: the README as the first page, the files beside
it, the results of the experiments, and the config keys from the comments of panet_d2/config.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- config keys -->"
HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")


class Key(NamedTuple):
    """A config key: its full name, its default as in the source, and its comment's lines."""

    name: str
    default: str
    comment: List[str]


def config_keys(source: str) -> List[Tuple[List[str], List[Key]]]:
    """
    Args:
        source (str): the text of panet_d2/config.py.

    Returns:
        list[tuple[list[str], list[Key]]]: for each section, the lines of the comment at its head,
        and its keys.
    """
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    lines = source.splitlines()
    shared = list(_assignments(functions["_afp_node"], lines))
    sections: List[Tuple[List[str], List[Key]]] = []
    for name, value, comment in _assignments(functions["_panet_config"], lines):
        rules = [i for i, line in enumerate(comment) if line.startswith("----")]
        if rules:
            sections.append((comment[rules[0] + 1 : rules[1]], []))
            comment = comment[rules[1] + 1 :]
        if value == "_afp_node()":
            if name.endswith(f"{HEADS[0]}.AFP"):  # the other heads have the same keys
                sections[-1][1].extend(Key(f"{name}.{k}", v, c) for k, v, c in shared)
        elif not value.startswith("CN("):
            sections[-1][1].append(Key(name, value, comment))
    return sections


def _assignments(
    function: ast.FunctionDef, lines: List[str]
) -> Iterator[Tuple[str, str, List[str]]]:
    """Yield name, value and comment of each ``_C.NAME = value`` or ``node.NAME = value``."""
    for statement in function.body:
        if not isinstance(statement, ast.Assign) or "." not in ast.unparse(statement.targets[0]):
            continue
        first = statement.lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        comment = [line.strip()[1:].strip(" ") for line in lines[first : statement.lineno - 1]]
        indents = [
            len(line) - len(line.lstrip(" #")) - 6 for line in lines[first : statement.lineno - 1]
        ]
        comment = [" " * max(0, indent) + text for indent, text in zip(indents, comment)]
        name = ast.unparse(statement.targets[0]).partition(".")[2]
        yield name, ast.get_source_segment("\n".join(lines), statement.value) or "", comment


def config_reference(source: str) -> str:
    """Return the sections and keys of panet_d2/config.py as Markdown."""
    parts = []
    for head, keys in config_keys(source):
        # "Title (PANet, Sec. 3.1). Enabled by …": the brackets begin the first paragraph.
        title, text = re.match(
            r"(.*?)(?: \(|\. |\.?$)(.*)", " ".join(map(str.strip, head))
        ).groups()
        text = text.replace("). ", ". ", 1)
        parts.append(f"## {title}\n\n{_code(text)}\n")
        described = keys[0]
        for key in keys:
            if key.comment:
                described = key
            text = _prose(key.comment) or f"See `{described.name}`."
            parts.append(f"### {key.name}\n\nDefault: `{key.default}`\n\n{text}\n")
            if f"{HEADS[0]}.AFP" in key.name:
                others = (f"`{key.name.replace(HEADS[0], head)}`" for head in HEADS[1:])
                parts.append(f"The same for the other heads: {', '.join(others)}.\n")
    return "\n".join(parts)


def _prose(comment: List[str]) -> str:
    """A comment as paragraphs; lines that are indented more are items of a list."""
    text = ""
    for line in comment:
        item = re.match(r'  ("\w+")  +(.*)', line)
        if item:
            text += f"\n- {item[1]}: {item[2]}"
        elif text.rpartition("\n")[2].startswith("- ") and not line.startswith("  "):
            text += f"\n\n{line}"
        else:
            text += f" {line.strip()}"
    # A blank line before the first item.
    return _code(re.sub(r"(?<!\n)(?<!^)\n- ", "\n\n- ", text.strip(), count=1))


def _code(text: str) -> str:
    """Put config keys, values in quotes, class names and files into code style."""
    names = r"[A-Z_]{2,}[A-Z0-9_]*(?:\.[A-Z0-9_]+)+|[A-Z]{2,}_[A-Z0-9_]+|[\w/]+\.(?:py|md|yaml)"
    classes = r"\b(?:build_\w+|panet_d2(?:\.\w+)+|PANet\w*Heads?\b|MaskRCNN\w+)"
    value = rf"(?:: (?:\d+|True|False|{classes}))?"
    return re.sub(rf'("[\w ]*"|(?:{names}){value}|{classes})', r"`\1`", text)


# The rest is called by MkDocs.


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "experiments/results").rglob("*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The pages of this folder and the files beside it are in one folder of the site."""
    if page.file.src_uri.startswith("experiments/"):
        return markdown
    if PLACE in markdown:
        source = (ROOT / "panet_d2/config.py").read_text(encoding="utf-8")
        markdown = re.sub(f".*{PLACE}.*", lambda _: config_reference(source), markdown)

    def link(match: re.Match) -> str:
        text, target = match[1], re.sub(r"^(?:docs|\.\.)/", "", match[2])
        path = target.partition("#")[0]
        # The site does not have the source: its links become text.
        if files.get_file_from_path(path) is None and (ROOT / path).exists():
            return text if path else match[0]
        return f"[{text}]({target})"

    return re.sub(r"\[([^][]*)\]\(([^)\s]+)\)", link, markdown)
