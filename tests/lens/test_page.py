"""The page of the lens: complete and self-contained, checked as text, and in a browser where there is one."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_imgproc_attn.lens.definitions import DEFINITIONS
from hf_imgproc_attn.lens.page import PANELS
from hf_imgproc_attn.lens.report import HEAD_COLUMNS
from tests.helpers import ROOT, run_command
from tests.lens.browser import OPTIONS, browser


class Outline(HTMLParser):
    """Elements that are open at the end, ids, and where sources come from."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "img":
            self.alternatives.append(found.get("alt") or "")
        self.sources += [str(found[name]) for name in ("src", "href") if found.get(name)]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(look: Path) -> str:
    return (look / "lens.html").read_text(encoding="utf-8")


def test_page_needs_nothing_from_elsewhere(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert outline.sources
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert all(outline.alternatives)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|<link", page)


def test_every_panel_says_what_it_shows_and_what_to_look_for(page: str) -> None:
    sections = re.findall(r'<section class="panel" id="(\w+)".*?</section>', page, re.DOTALL)
    assert sections == list(PANELS)
    for title, shows, look in PANELS.values():
        assert f"<h2>{title}</h2>" in page
        assert shows.endswith(".")
        assert look.endswith(".")
        for words in (shows, look):
            assert html.escape(words) in page


def test_every_number_of_the_page_is_defined_there_and_in_the_docs(page: str) -> None:
    assert set(HEAD_COLUMNS) <= set(DEFINITIONS)
    docs = (ROOT / "docs" / "lens.md").read_text(encoding="utf-8")
    for name, definition in DEFINITIONS.items():
        assert html.escape(definition.title) in page
        assert f"| `{name}` |" in docs, f"docs/lens.md does not define {name}"
    for panel in ("numbers", "definitions"):
        assert f'id="{panel}"' in page


def test_texts_are_coloured_by_what_the_token_receives(page: str) -> None:
    """A line a kernel, a span a token; what receives most is darkest, and the chosen token is marked."""
    lines = re.findall(r'<p class="tokens"><b>(\w+)</b> (.*?)</p>', page)
    assert [kernel for kernel, _ in lines] == 2 * ["content", "position", "product"] + 2 * [
        "content", "position", "product", "operator"
    ]  # fmt: skip
    for _, line in lines:
        spans = re.findall(
            r'<span( class="chosen")? style="background:rgba\(([\d,]+),([\d.]+)\)" title="(.*?)">', line
        )
        assert len(spans) == 12
        assert [bool(mark) for mark, *_ in spans].index(True) == 6
        strengths = {abs(float(weight)): float(strength) for _, _, strength, weight in spans}
        assert strengths[max(strengths)] == 0.6
        assert all(colour == ("213,94,0" if weight.startswith("-") else "0,114,178") for _, colour, _, weight in spans)


def test_names_of_models_are_no_markup() -> None:
    from hf_imgproc_attn.lens.page import page as make_page
    from hf_imgproc_attn.lens.report import LayerReport, Report

    report = Report("<script>alert(1)</script>", "x&y", 1, "data", 1, 2, layers=[LayerReport("a", 0, "stock")])
    text = make_page([report], {})
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "x&amp;y" in text


def test_page_works_in_a_browser(page: str, tmp_path: Path) -> None:
    """It loads without an error, shows one panel, and switches panel and view when a user does."""
    click = """<script>
    document.querySelector('button[data-panel=maps]').click();
    var select = document.querySelector('#maps select');
    select.value = 'maps-3'; select.dispatchEvent(new Event('change'));
    document.body.dataset.clicked = location.hash;
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", click), encoding="utf-8")
    done = run_command(
        [browser(), *OPTIONS, f"--user-data-dir={tmp_path}/u", "--dump-dom", file.as_uri()], timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    assert 'data-ready="yes"' in done.stdout
    assert 'data-clicked="#maps"' in done.stdout
    assert re.findall(r'<section class="panel shown" id="(\w+)"', done.stdout) == ["maps"]
    assert re.findall(r'<figure id="(maps-\d+)" class="view shown"', done.stdout) == ["maps-3"]
    assert re.findall(r'data-panel="(\w+)" aria-selected="true"', done.stdout) == ["maps"]
