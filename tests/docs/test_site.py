"""The site of `make docs`: warnings are errors, and every link and anchor resolves."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from panet_d2.check_config import flatten
from panet_d2.config import _panet_config

from ..common import ROOT

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason="make setup installs what builds the site")


class Page(HTMLParser):
    """The ids of a page, its links, and what the browser loads for it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") == "stylesheet":
            self.loads.append(attrs["href"])


def build(root, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    site = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, site)
    assert done.returncode == 0, done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_links_and_anchors_resolve(pages):
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the root of the server
        for link in [*page.links, *page.loads]:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].ids, f"{path.name}: {link}"


def test_nothing_is_loaded_from_other_servers(pages):
    assert not [link for page in pages.values() for link in page.loads if urlsplit(link).netloc]


def test_config_reference_and_api_are_there(pages):
    by_name = {path.name: page for path, page in pages.items()}
    for key, _ in flatten(_panet_config()):
        # The keys of the other heads are those of the box head.
        first = re.sub("ROI_(MASK|KEYPOINT)_HEAD.AFP", "ROI_BOX_HEAD.AFP", key)
        assert first.lower().replace(".", "") in by_name["config.html"].ids, key
    packages = [p.parent.name for p in (ROOT / "panet_d2").glob("*/__init__.py")]
    for name in packages:
        package = importlib.import_module(f"panet_d2.{name}")
        for public in getattr(package, "__all__", ()):
            if not callable(getattr(package, public)):
                continue  # a constant
            full = f"panet_d2.{name}.{public}"
            # A function may have the name of its module.
            assert {full, f"{full}.{public}"} & by_name["api.html"].ids, full
