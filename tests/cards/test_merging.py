"""What people change in a published card stays when the checkpoint is published again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_imgproc_attn.cards.merging import front_matter_of, merge_card
from hf_imgproc_attn.cards.rendering import RunResults, load_results, render_card
from hf_imgproc_attn.errors import UsageError
from tests.helpers import ROOT

RESULTS = ROOT / "training" / "results"
SECTION = "## Intended use\n\nTeaching.\n\n```\n# no heading\n```"


def results(name: str) -> RunResults:
    return load_results(Path(RESULTS / f"vit_digits_{name}.json"))


def card(preset: str, revision: str, **options: Any) -> str:
    return render_card(results(preset), repo_id="ann/digits", revision=revision, **options)


def published(preset: str = "twicing", revision: str = "v1", **options: Any) -> str:
    return merge_card(card(preset, revision, **options), None, revision=revision).text


def republish(edited: str, preset: str, revision: str = "v2", **options: Any) -> str:
    given = {key: options.pop(key) for key in ("force", "given") if key in options}
    return merge_card(card(preset, revision, **options), edited, revision=revision, **given).text


def with_keys(text: str, **keys: Any) -> str:
    """A card with keys of the front matter changed; None deletes one."""
    _, head, body = text.split("---\n", 2)
    content = {**yaml.safe_load(head), **keys}
    content = {key: value for key, value in content.items() if value is not None}
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n{body}"


def headings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("## ")]


def test_a_card_is_what_was_generated_and_a_comment() -> None:
    text = published()
    generated = card("twicing", "v1")
    assert headings(text) == headings(generated)
    assert front_matter_of(text) == front_matter_of(generated)
    assert text.replace(text[text.index("<!-- hf_imgproc_attn") :], "").rstrip().endswith("```")
    body = generated.split("---\n", 2)[2].strip()
    assert text.split("---\n", 2)[2].strip().startswith(body)


def test_the_same_run_again_changes_no_byte() -> None:
    text = published()
    assert republish(text, "twicing", "v1") == text
    laid_out_otherwise = with_keys(text, tags=front_matter_of(text)["tags"]).replace("\n", "\r\n")
    assert laid_out_otherwise != text
    assert republish(laid_out_otherwise, "twicing", "v1") == laid_out_otherwise


def test_another_run_replaces_all_that_nobody_touched() -> None:
    assert republish(published("twicing", "v1"), "bilateral") == published("bilateral", "v2")


@pytest.mark.parametrize("before", ["## Results", "## Limits", "## Citations", None])
def test_a_section_that_was_added_stays_where_it_is_for_ever(before: str | None) -> None:
    text = published()
    edited = f"{text}\n{SECTION}\n" if before is None else text.replace(before, f"{SECTION}\n\n{before}")
    for preset, revision in (("bilateral", "v2"), ("nlm", "v3"), ("twicing", "v4")):
        edited = republish(edited, preset, revision)
        assert edited.count(SECTION) == 1
        found = headings(edited)
        assert found.index("## Intended use") == (len(found) - 1 if before is None else found.index(before) - 1)
        assert f'revision="{revision}"' in edited
        assert "`" + preset + "` self-attention" in edited


def test_text_below_the_comment_stays() -> None:
    edited = published() + "\nThanks to Ann.\n"
    again = republish(republish(edited, "bilateral", "v2"), "nlm", "v3")
    assert again.endswith("-->\n\nThanks to Ann.\n")


def test_keys_that_were_added_or_changed_stay() -> None:
    text = published()
    edited = with_keys(text, license="cc-by-4.0", thumbnail="a.png", tags=["mine", *front_matter_of(text)["tags"]])
    merged = merge_card(card("bilateral", "v2"), edited, revision="v2")
    found = merged.front_matter
    assert (found["license"], found["thumbnail"]) == ("cc-by-4.0", "a.png")
    assert "license stays 'cc-by-4.0', as the card on the Hub has it" in merged.notes
    assert {"mine", "bilateral"} <= set(found["tags"])
    assert "twicing" not in found["tags"]
    assert front_matter_of(merged.text) == found
    again = front_matter_of(republish(merged.text, "nlm", "v3"))
    assert (again["license"], again["thumbnail"]) == ("cc-by-4.0", "a.png")


def test_a_licence_that_was_generated_is_no_edit_and_one_that_is_given_wins() -> None:
    text = published(license="mit")
    assert "license" not in front_matter_of(republish(text, "bilateral"))
    edited = with_keys(text, license="cc-by-4.0")
    assert front_matter_of(republish(edited, "bilateral", license="mit"))["license"] == "cc-by-4.0"
    given = republish(edited, "bilateral", license="mit", given=frozenset({"license"}))
    assert front_matter_of(given)["license"] == "mit"


def test_figures_are_always_the_runs() -> None:
    edited = with_keys(published(), **{"model-index": [{"name": "x", "results": []}]})
    assert front_matter_of(republish(edited, "bilateral")) == front_matter_of(published("bilateral", "v2"))


def test_an_edited_section_stays_until_the_run_has_something_else_to_say() -> None:
    text = published()
    edited = text.replace("## Quick start\n", "## Quick start\n\nFirst install torch.\n")
    again = merge_card(card("twicing", "v2"), edited, revision="v2")
    assert "First install torch." in again.text
    assert 'revision="v2"' in again.text
    assert 'revision="v1"' not in again.text
    assert "'Quick start' of README.md stays as it was edited on the Hub" in again.notes

    edited = text.replace("| clean | accuracy |", "| clean | ACCURACY |", 1)
    assert "ACCURACY" in republish(edited, "twicing")
    message = r"README.md was edited on the Hub where this run has something else to say \(Results\)"
    with pytest.raises(UsageError, match=message):
        republish(edited, "bilateral")
    forced = merge_card(card("bilateral", "v2"), edited, revision="v2", force=True)
    assert "ACCURACY" not in forced.text
    assert any("'Results' of README.md was edited on the Hub and is replaced" in note for note in forced.notes)


def test_a_section_that_was_deleted_stays_away_until_there_is_news() -> None:
    text = published()
    start, end = text.index("## Environment"), text.index("## Citations")
    edited = text[:start] + text[end:]
    assert "## Environment" not in headings(republish(edited, "twicing"))
    assert "## Environment" in headings(republish(edited, "bilateral"))


def test_a_card_that_was_there_before_the_first_publication() -> None:
    foreign = "---\nlicense: mit\ndatasets: [a/b]\n---\n# Soon\n"
    merged = merge_card(card("twicing", "v1"), foreign, revision="v1")
    assert "Soon" not in merged.text
    assert (merged.front_matter["license"], merged.front_matter["datasets"]) == ("mit", ["a/b"])
    foreign += "\nWait.\n\n## Thanks\n\nto all\n"
    text = merge_card(card("twicing", "v1"), foreign, revision="v1").text
    assert "# Soon\n\nWait." in text
    assert "## Thanks\n\nto all" in text
    assert "## Thanks\n\nto all" in republish(text, "bilateral")


def test_a_card_of_an_earlier_version_is_replaced_and_its_additions_stay() -> None:
    earlier = card("twicing", "v1", license="apache-2.0").replace("## Limits", f"{SECTION}\n\n## Limits")
    text = republish(earlier, "bilateral")
    assert SECTION in text
    assert headings(text.replace(SECTION, "")) == headings(card("bilateral", "v2"))
    assert "2A - A^2" not in text


@pytest.mark.parametrize(
    ("front_matter", "message"), [("a: [", "is not valid YAML"), ("- a", "must be a mapping, got list")]
)
def test_front_matter_that_cannot_be_read_is_refused(front_matter: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"the front matter of README.md {message}"):
        merge_card(card("twicing", "v1"), f"---\n{front_matter}\n---\n# x\n", revision="v1")
