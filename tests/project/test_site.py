"""The documentation builds as a site, without warnings, and has every page of its navigation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def html_of(page: str) -> str:
    """The file of a Markdown page, below the site."""
    name = re.sub(r"(README|index)\.md$", "index.html", page)
    return name if name.endswith(".html") else f"{page.removesuffix('.md')}/index.html"


@pytest.mark.slow
def test_every_page_of_the_navigation_is_built(site):
    navigation = re.search(r"^nav:\n((?: .*\n)+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    pages = re.findall(r"(\S+\.md)$", navigation[1], flags=re.M)
    assert len(pages) > 20
    assert not [page for page in pages if not (site / html_of(page)).exists()]
    inside = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert inside <= set(pages)


@pytest.mark.slow
def test_pages_have_one_heading_of_the_first_level(site):
    counts = {path: path.read_text(encoding="utf-8").count("<h1") for path in site.rglob("index.html")}
    assert not {path: count for path, count in counts.items() if count != 1}


@pytest.mark.slow
def test_api_pages_are_made_from_docstrings(site):
    caching = (site / "api/caching/index.html").read_text(encoding="utf-8")
    assert 'id="skipdit.caching.parse_policy"' in caching
    assert 'id="class-to-image.model.DiT"' in (site / "api/models/index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_links_to_files_outside_docs(site):
    """Images are in the site; a source file is not, so its link is text."""
    plans = (site / "plans/index.html").read_text(encoding="utf-8")
    assert 'src="../visuals/plans.png"' in plans
    assert (site / "visuals/plans.png").read_bytes() == (ROOT / "visuals/plans.png").read_bytes()
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "<code>src/skipdit/layers/skip.py</code>" in home
    assert 'href="caching/#in-diffusers-pipelines"' in home
