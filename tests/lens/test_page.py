"""The page of the lens: complete and self-contained, checked as text, and in a browser where there is one."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_imgproc_attn.lens import LayerReport, Report
from hf_imgproc_attn.lens.definitions import DEFINITIONS, GROUPS, docs_table, learned_definitions
from hf_imgproc_attn.lens.figures import DRAWINGS, STEPS
from hf_imgproc_attn.lens.map_figures import draw_maps, draw_removed
from hf_imgproc_attn.lens.page import PANELS
from hf_imgproc_attn.lens.report import kinds_of
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


def test_definitions_are_the_same_on_the_page_and_in_the_docs(page: str) -> None:
    docs = (ROOT / "docs" / "lens.md").read_text(encoding="utf-8")
    for group, held in GROUPS.items():
        assert docs_table(group) in docs, (
            f"docs/lens.md does not have: python -m hf_imgproc_attn.lens.definitions {group}"
        )
        for each in held.values():
            assert f'<td class="text">{html.escape(each.title)}</td>' in page
            assert f'<td class="text">{html.escape(each.formula)}</td>' in page
    assert len({each.title for each in DEFINITIONS.values()}) == len(DEFINITIONS) == sum(map(len, GROUPS.values()))


SCOPES = ("seconds", "learned")
"""What is below these has a definition as a whole, or elsewhere."""


def numbers_of(held: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names that lead to each number of lens.json."""
    if isinstance(held, dict):
        for name, value in held.items():
            yield from numbers_of(value, (*path, name))
    elif isinstance(held, list):
        for value in held:
            yield from numbers_of(value, path)
    elif isinstance(held, (int, float)):
        yield path


def test_every_number_of_the_record_is_defined(look: Path) -> None:
    """Each name on the way to it, beside the lists of layers and heads."""
    reports = json.loads((look / "lens.json").read_text(encoding="utf-8"))
    paths = set(numbers_of(reports))
    assert len(paths) > 70
    for path in paths:
        names = [name for name in path if name not in ("layers", "heads", "maps", "tokens")]
        if path[0] != "layers":
            names = ["report.noise"] if path == ("noise",) else names[:1] if names[0] in SCOPES else names
        if "learned" in names:
            assert set(learned_definitions(names[-1:])) == {names[-1]}
            names = names[:-1]
        assert set(names) <= set(DEFINITIONS), path


def _words(figure: Figure) -> Iterator[str]:
    """What stands beside numbers: titles without the model, labels of axes, entries of legends, names of bars."""
    for legend in figure.legends:
        yield from (text.get_text() for text in legend.get_texts())
    for axes in figure.axes:
        yield from axes.get_title().split("\n")
        yield axes.get_xlabel()
        yield from axes.get_ylabel().split("\n")
        legend = axes.get_legend()
        yield from () if legend is None else (text.get_text() for text in legend.get_texts())
        yield from (label.get_text().split("\n")[-1] for label in axes.get_xticklabels() if "\n" in label.get_text())


def test_every_word_of_the_pictures_is_defined(report: Report, look: Path) -> None:
    """Titles of definitions, or steps and units that they explain."""
    reports = [report, *(Report.from_dict(each) for each in json.loads((look / "lens.json").read_text("utf-8")))]
    defined = {each.title for each in DEFINITIONS.values()} | {f"{each.title}, dB" for each in DEFINITIONS.values()}
    explained = {
        **dict.fromkeys(STEPS, DEFINITIONS["gain, dB"].formula),
        "gain, dB (above 0: removes noise)": DEFINITIONS["gain, dB"].formula,
        "proposition III.1": DEFINITIONS["predicted_gain"].formula,
    }
    for step in ("filter", "attention with its residual", "whole block"):
        assert f"({step})" in DEFINITIONS["gain, dB"].formula
    assert "proposition III.1" in DEFINITIONS["predicted_gain"].formula
    words: set[str] = set()
    for draw in DRAWINGS.values():
        words |= set(_words(draw(reports)))
    for each in reports:
        for layer in each.layers:
            for picture in (draw_maps(each, layer), draw_removed(each, layer)):
                assert picture is not None
                words |= set(_words(picture))
    words -= {"", *(each.model for each in reports)}
    words = {re.sub(r"^eigenvalues, layer \d+$", "eigenvalues", word) for word in words}
    assert len(words) > 30
    assert words - {"layer (a dot a head)", "token"} - set(explained) <= defined


def test_every_column_of_tables_is_defined(page: str, look: Path) -> None:
    titles = {each.title for each in DEFINITIONS.values()}
    titles |= {f"{title}, dB" for title in titles} | {"of", "place", "parts"}
    titles |= {f"{DEFINITIONS['shares'].title.replace('share', 'shares', 1)}, mean over heads"}
    columns = set(re.findall(r"<th>(.*?)</th>", page))
    markdown = (look / "lens.md").read_text(encoding="utf-8").splitlines()
    for line, rule in itertools.pairwise(markdown):
        if rule.startswith("|---"):
            columns |= set(line.strip("| ").split(" | "))
    learned = {column.removeprefix("its ") for column in columns if column.startswith("its ")}
    assert {"h_y", "h_p"} <= learned
    assert all(f">its {name}</td>" in page for name in learned_definitions(learned))
    assert {html.unescape(column) for column in columns if not column.startswith("its ")} <= titles


def test_filters_of_the_models_are_named(page: str, look: Path) -> None:
    boosted = "content kernel dot_product, position kernel untied, boosting twicing"
    for text in (page, (look / "lens.md").read_text(encoding="utf-8")):
        assert "2 layers, stock attention" in text
        assert f"2 layers, {boosted}" in text
    layers = [LayerReport("a", 0, "stock attention"), *(LayerReport("b", i, boosted) for i in (1, 2))]
    assert kinds_of(Report("m", "x", 1, "d", 1, 2, layers=layers)) == (
        f"stock attention in layer 0; {boosted} in layers 1, 2"
    )


def test_texts_are_coloured_by_what_the_token_receives(page: str) -> None:
    """A line a kernel, a span a token; what receives most is darkest, and the chosen token is marked."""
    lines = re.findall(r'<p class="tokens"><b>(\w+)</b> (.*?)</p>', page)
    kernels = ["content", "position", "product"]
    assert [kernel for kernel, _ in lines] == 2 * [*kernels, *kernels, "operator"]
    for _, line in lines:
        spans = re.findall(
            r'<span( class="chosen")? style="background:rgba\(([\d,]+),([\d.]+)\)" title="(.*?)">', line
        )
        assert len(spans) == 12
        assert [bool(mark) for mark, *_ in spans].index(True) == 6
        strengths = {abs(float(weight)): float(strength) for _, _, strength, weight in spans}
        assert strengths[max(strengths)] == 0.6
        assert all(colour == ("213,94,0" if weight.startswith("-") else "0,114,178") for _, colour, _, weight in spans)


def test_models_stand_below_each_other_layer_by_layer(page: str) -> None:
    """One choice for both: the same layer of each."""
    section = page[page.index('<section class="panel" id="maps"') :].partition("</section>")[0]
    assert re.findall(r"<option .*?>(.*?)</option>", section) == ["layer 0", "layer 1"]
    for number, group in enumerate(re.findall(r'<div id="maps-\d" class="view">(.*?)</div>', section, re.DOTALL)):
        assert re.findall(r"<figcaption>(.*?)</figcaption>", group) == [
            f"llama layer {number}",
            f"gpt2 layer {number}",
        ]


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
    select.value = 'maps-1'; select.dispatchEvent(new Event('change'));
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
    assert re.findall(r'<div id="(maps-\d+)" class="view shown"', done.stdout) == ["maps-1"]
    assert re.findall(r'data-panel="(\w+)" aria-selected="true"', done.stdout) == ["maps"]
