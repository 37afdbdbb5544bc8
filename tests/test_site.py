"""The documentation's site: builds strictly, holds every page, shows mathematics and leads links somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tests.helpers import ROOT, site_pages


def build_site(place: Path, **settings: str) -> Path:
    """The site as ``make docs`` builds it."""
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(place), **settings))
    return place


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


def test_every_page_is_built(site: Path) -> None:
    for page in site_pages():
        text = (site / page.replace(".md", ".html")).read_text(encoding="utf-8")
        assert "<h1" in text
    assert not list(site.rglob("hooks*"))


def test_formulas_are_mathml(site: Path) -> None:
    """As many as the page's source has, none of them with a command that was not understood."""
    source = (ROOT / "docs" / "framework.md").read_text(encoding="utf-8")
    displayed = re.findall(r"^```math$", source, re.MULTILINE)
    inline = re.findall(r"\$[^$]+\$", re.sub(r"```.*?```", "", source, flags=re.DOTALL))
    page = (site / "framework.html").read_text(encoding="utf-8")
    assert len(inline) > 150
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">') == len(inline)
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == len(displayed) > 0
    assert not re.search(r"arithmatex|<merror|\\[a-z]{2,}", page)


def test_linked_files_of_the_repository_are_there(site: Path) -> None:
    """What strict builds do not check: the links that hooks.py leads to the texts of tests, code and cards."""
    linked = {
        (page.parent / target).resolve()
        for page in site.glob("*.html")
        for target in re.findall(r'href="(source/[^"#]+)', page.read_text(encoding="utf-8"))
    }
    assert len(linked) > 20
    assert [path for path in linked if not path.is_file()] == []
    name = "tests/test_propositions.py"
    assert (site / "source" / f"{name}.txt").read_bytes() == (ROOT / name).read_bytes()


def test_browsers_need_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img)[^>]* src="(?:https?:)?//|<link[^>]* href="(?:https?:)?//', text), page


@pytest.mark.parametrize("link", ["missing.md", "speed.md#missing", "../tests/missing.py", "../tests"])
def test_a_link_that_leads_nowhere_fails_the_build(link: str, tmp_path: Path) -> None:
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (docs / "speed.md").open("a", encoding="utf-8") as page:
        page.write(f"\nSee [there]({link}).\n")
    with pytest.raises(Abort, match="1 warning"):
        build_site(tmp_path / "site", docs_dir=str(docs))
