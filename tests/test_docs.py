"""docs/framework.md against the code: its links and tests exist, and it names every value of every axis."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.catalogue.works import PAPERS
from hf_imgproc_attn.models.spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    FEEDBACKS,
    GATES,
    NORMALISATIONS,
    POSITION_KERNELS,
    RESIDUALS,
)
from tests.helpers import ROOT, site_pages

PAGE_FILE = ROOT / "docs" / "framework.md"
PAGE = PAGE_FILE.read_text(encoding="utf-8")
REFERENCES = dict(re.findall(r"^\[([^\]`]+)\]: (\S+)$", PAGE, re.MULTILINE))
"""Link definitions at the end of the page: name -> path."""
LINKED_TESTS = re.findall(r"\[`(test_\w+)`\]\[([^\]]+)\]", PAGE)
"""Name of the test, name of its link."""


def target(path: str) -> Path:
    return (PAGE_FILE.parent / path.split("#")[0]).resolve()


def section(heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    _, found, rest = PAGE.partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(heading: str) -> set[str]:
    """What stands in code at the beginning of the rows of a section's tables, the heads left out."""
    return set(re.findall(r"^\| `(\w+)`(?=[^|]*\|)", section(heading), re.MULTILINE))


def test_linked_files_exist() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", PAGE) + list(REFERENCES.values())
    assert len(linked) > 20
    missing = [path for path in linked if not target(path).is_file() or ROOT not in target(path).parents]
    assert missing == []


def test_named_tests_are_in_the_linked_files() -> None:
    assert len(LINKED_TESTS) > 50
    assert set(re.findall(r"`(test_\w+)`", PAGE)) == {name for name, _ in LINKED_TESTS}, "a test without a link"
    assert {link for _, link in LINKED_TESTS} == set(REFERENCES)
    lost = [
        f"{REFERENCES[link]}: {name}"
        for name, link in LINKED_TESTS
        if f"\ndef {name}(" not in target(REFERENCES[link]).read_text(encoding="utf-8")
    ]
    assert lost == []


DEFINITIONS = (
    "Tokens (or patches) $i = 1",
    "$q_i$, $k_j$ are",
    "$p$ is a token's index",
    "**Feedback** adds to a head's output",
    "A preset sets the fields below",
)
"""Beginnings of what names things and claims nothing that a test could show."""


def test_every_statement_is_linked_to_a_test() -> None:
    """Each paragraph and item of a list links a test; of a table itself, the text before or the one after it."""
    body = PAGE[PAGE.index("\n## 1. ") : PAGE.index(f"\n[{next(iter(REFERENCES))}]: ")]
    body = re.sub(r"^```math\n.*?^```\n", "", body, flags=re.MULTILINE | re.DOTALL)
    blocks = [
        block.strip() for block in body.split("\n\n") if block.strip() and not block.strip().startswith(("#", "!"))
    ]
    unlinked = []
    for index, block in enumerate(blocks):
        if block.startswith("|"):
            items = ["".join(blocks[index - 1 : index + 2])]
        else:
            items = re.split(r"\n(?=- |\d+\. )", block)
        unlinked += [item for item in items if "[`test_" not in item and not item.startswith(DEFINITIONS)]
    assert len(blocks) > 40
    assert unlinked == []
    assert all(any(block.startswith(beginning) for block in blocks) for beginning in DEFINITIONS)


@pytest.mark.parametrize(
    ("heading", "field", "values"),
    [
        ("### Content kernels", "content_kernel", CONTENT_KERNELS),
        ("### Position kernels", "position_kernel", POSITION_KERNELS),
        ("## 4. Boosting", "boosting", BOOSTINGS),
        ("## 5. Residual schemes across depth", "residual", RESIDUALS),
        ("## 6. Feedback and the elliptical metric", "feedback", FEEDBACKS),
        ("### Gate", "gate", GATES),
        ("### Normalisation", "normalisation", NORMALISATIONS),
    ],
)
def test_every_value_of_an_axis_has_a_row(heading: str, field: str, values: tuple[str, ...]) -> None:
    assert first_cells(heading) == {field, *values}


def test_every_preset_is_named() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", section("## 8. Presets"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(PRESETS)


def test_cited_works_are_those_of_the_catalogue() -> None:
    """Each arXiv number of the page is one of the works that cards cite, and none of those is left out."""
    known = {
        number for paper in PAPERS.values() for number in re.findall(r"arxiv\.org/abs/(\d+\.\d+)", paper.reference)
    }
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", PAGE)) == known


def test_navigation_of_the_site_names_every_page_once() -> None:
    """The pages of docs/, and those that docs/hooks.py makes of README, CONTRIBUTING and CHANGELOG."""
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(site_pages()) == sorted([*pages, "index.md", "contributing.md", "changelog.md"])


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = ("hf_imgproc_attn", "tests", "training", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = set(re.findall(r"[\w/]*\w\.py\b", text))
    assert len(named) > 40
    lost = [
        name for name in sorted(named) if not any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in files)
    ]
    assert lost == []


def test_floors_of_the_flat_room_are_those_of_contributing() -> None:
    """Each prefix has a line, and each line has files."""
    layout = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Layout")[2].partition("\n  functional")[0]
    )
    floors = re.findall(r"(?:^ {4}|, )(\w+?)_\*", layout, re.MULTILINE)
    modules = {path.stem for path in (ROOT / "hf_imgproc_attn" / "models").glob("*.py")} - {"__init__", "visibility"}
    assert len(modules) > 30
    assert {name for name in modules if not name.startswith(tuple(f"{floor}_" for floor in floors))} == set()
    assert [floor for floor in floors if not any(name.startswith(f"{floor}_") for name in modules)] == []


def test_costs_of_which_filter_are_those_of_the_record() -> None:
    """Two numbers for each value that the benchmark times: causal, then not; those that cannot be are a dash."""
    record = json.loads((ROOT / "docs" / "benchmark_axes.json").read_text(encoding="utf-8"))
    assert record["git"]["dirty"] is False
    assert record["threads"] == 1
    ratios = {
        (row["method"], row["case"].startswith("causal")): f"{row['ratio']:.2f}"
        for row in record["rows"]
        if row["direction"] == "forward + backward"
    }
    page = (ROOT / "docs" / "which-filter.md").read_text(encoding="utf-8")
    for name in {method for method, _ in ratios} - {"plain"}:
        (line,) = re.findall(rf"^\| \w+ [^|]*`{name}`[^|]*\| ([^|]*)\|", page, re.MULTILINE)
        assert line.startswith(" / ".join(ratios.get((name, causal), "–") for causal in (True, False))), name


def test_costs_where_memory_is_kept_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "docs" / "benchmark_axes_memory.json").read_text(encoding="utf-8"))
    ratios = {
        row["method"]: f"{row['ratio']:.2f}"
        for row in record["rows"]
        if row["direction"] == "forward + backward" and not row["case"].startswith("causal")
    }
    page = (ROOT / "docs" / "which-filter.md").read_text(encoding="utf-8")
    sentence = page.partition("(benchmark_axes_memory.json)")[2].partition("\n\n")[0]
    said = re.findall(r"`(\w+)` ([\d.]+)[,.]", sentence)
    assert len(said) > 5
    assert said == [(name, ratios[name]) for name, _ in said]
