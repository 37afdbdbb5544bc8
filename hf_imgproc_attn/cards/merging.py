"""Publishing a card again without losing what people changed in it on the Hub.

A published card ends with a comment that holds short checksums of all that was generated: of every section and of
every key of the front matter. The next publication reads it back and so tells apart three things:

- what was generated and never touched: it is generated anew;
- what somebody added (a section, a key such as ``license`` or ``thumbnail``): it stays, a section behind the one that
  it followed;
- what was generated and then edited: it stays as it was edited, as long as the new run has nothing else to say there.
  Where it has, both cannot be right, and the publication is refused by the section's name.

Measured numbers in the front matter (``model-index``) are always the run's.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from ..backbones import BACKBONES, FILTERED_MODEL_TYPE
from ..errors import UsageError
from ..models.spec_fields import PRESETS

LIBRARY_TAG = "hf_imgproc_attn"
"""The tag of every card of ours."""
GENERATED_TAGS = {LIBRARY_TAG, "attention", "image-filtering", *BACKBONES, FILTERED_MODEL_TYPE, "custom", *PRESETS}

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_RECORD = re.compile(r"\n*<!-- hf_imgproc_attn: generated (\{.*?\}) -->\n?")
_FENCE = re.compile(r"^(```|~~~)")
_HEADING = re.compile(r"^#{1,2} ")
# Keys that only a run can know: what was generated for another run must not stay.
_OF_THE_RUN = ("model-index", "base_model", "datasets", "metrics")


@dataclass(frozen=True)
class MergedCard:
    """A card to publish.

    Attributes:
        text: the whole README.md.
        notes: what was kept of the card on the Hub, or replaced in it, one sentence each.
        front_matter: the parsed front matter of ``text``.
    """

    text: str
    notes: list[str]
    front_matter: dict[str, Any]


@dataclass
class _Card:
    """A parsed card; ``record`` is None where it ends with no comment of ours."""

    front_matter: dict[str, Any]
    sections: list[tuple[str, str]]
    record: dict[str, Any] | None
    revision: str = ""
    tail: str = ""
    notes: list[str] = field(default_factory=list)

    def section(self, heading: str) -> str | None:
        return next((text for name, text in self.sections if name == heading), None)

    def digest(self, text: str) -> str:
        """The same for two texts that differ in the pinned revision and in white space at the ends of lines only."""
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        return _digest(lines.replace(self.revision, "TAG") if self.revision else lines)


def merge_card(
    generated: str,
    published: str | None,
    *,
    revision: str,
    given: frozenset[str] = frozenset(),
    force: bool = False,
) -> MergedCard:
    """The card to publish in place of a published one.

    Args:
        generated: the card of the run, from :func:`.rendering.render_card`.
        published: README.md as it is on the Hub; None where there is none.
        revision: the tag that ``generated`` pins; it is no difference between two cards.
        given: keys of the front matter that the user has just asked for: they win over an edit on the Hub.
        force: replace edited sections where the run has something else to say, in place of refusing.

    Returns:
        The merged card; its text is ``published`` itself, to the byte, where nothing changes.

    Raises:
        UsageError: naming the sections in which an edit and the new run contradict each other, or if the published
            front matter cannot be read.
    """
    ours = _parse(generated)
    ours.revision = revision
    theirs = _parse(published) if published is not None else _Card({}, [], None)
    front_matter = _merged_front_matter(ours, theirs, given)
    sections = _merged_sections(ours, theirs, force)
    record = {
        "revision": revision,
        "keys": {key: _digest(value) for key, value in ours.front_matter.items()},
        "sections": {heading: ours.digest(text) for heading, text in ours.sections},
    }
    text = _write(front_matter, sections, record, theirs.tail)
    if published is not None and (front_matter, sections, record) == (
        theirs.front_matter,
        theirs.sections,
        theirs.record,
    ):
        text = published  # the Hub's editor may have laid it out otherwise
    return MergedCard(text, theirs.notes, front_matter)


def front_matter_of(card: str) -> dict[str, Any]:
    """The front matter of a README.md; empty where there is none.

    Raises:
        UsageError: if it is no YAML mapping.
    """
    import yaml

    match = _FRONT_MATTER.match(card.replace("\r\n", "\n"))
    if match is None:
        return {}
    try:
        content = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise UsageError(f"the front matter of README.md is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"the front matter of README.md must be a mapping, got {type(content).__name__}")
    return content


def _parse(card: str) -> _Card:
    text = card.replace("\r\n", "\n")
    front_matter = front_matter_of(text)
    body = _FRONT_MATTER.sub("", text, count=1)
    record, tail = None, ""
    if match := _RECORD.search(body):
        try:
            record = json.loads(match[1])
        except ValueError:
            record = None  # somebody's edit: as if there were none
        # Text below the comment was added by hand; its headings make sections of their own.
        body, tail = body[: match.start()], body[match.end() :]
    sections, extra = _split(body), _split(tail)
    if extra and not extra[0][0]:
        tail = extra.pop(0)[1]
    else:
        tail = ""
    revision = str(record.get("revision", "")) if record else ""
    return _Card(front_matter, [*sections, *extra], record, revision, tail)


def _split(body: str) -> list[tuple[str, str]]:
    """The sections of a text as (heading, text with the heading); the heading of what comes before the first is ""."""
    chunks: list[tuple[str, list[str]]] = [("", [])]
    fenced = ""
    for line in body.splitlines():
        if fence := _FENCE.match(line):
            fenced = "" if fenced == fence[1] else fenced or fence[1]
        if not fenced and _HEADING.match(line):
            chunks.append((line.strip(), []))
        chunks[-1][1].append(line)
    texts = [(heading, "\n".join(lines).strip()) for heading, lines in chunks]
    return [(heading, text) for heading, text in texts if text]


def _merged_sections(ours: _Card, theirs: _Card, force: bool) -> list[tuple[str, str]]:
    """The generated sections with what people made of them, and the sections that people added."""
    known: dict[str, str] = theirs.record.get("sections", {}) if theirs.record else {}
    merged, contradicted = [], []
    for heading, text in ours.sections:
        found, digest = theirs.section(heading), known.get(heading)
        name = heading.lstrip("# ") or "the text above the title"
        if digest is None or (found is not None and theirs.digest(found) in (digest, ours.digest(text))):
            merged.append((heading, text))  # never seen before, or not edited
        elif digest == ours.digest(text):  # edited, and the run says what the last one said
            theirs.notes.append(f"{name!r} of README.md stays as it was edited on the Hub")
            if found is not None:
                merged.append((heading, found.replace(theirs.revision, ours.revision)))
        elif force or found is None:
            merged.append((heading, text))
            done = "deleted on the Hub and is back" if found is None else "edited on the Hub and is replaced"
            theirs.notes.append(f"{name!r} of README.md was {done}: this run has something else to say there")
        else:
            contradicted.append(name)
    if contradicted:
        raise UsageError(
            f"README.md was edited on the Hub where this run has something else to say ({', '.join(contradicted)}): "
            "move the edit into a section of its own, which is kept, or replace it with --force"
        )
    for index, (heading, text) in enumerate(theirs.sections):
        is_ours = heading in known or any(heading == name for name, _ in ours.sections)
        untouched = heading in known and theirs.digest(text) == known[heading]
        if is_ours and (untouched or any(heading == name for name, _ in ours.sections)):
            continue
        if heading.startswith("# ") and text == heading and theirs.record is None:
            continue  # a title and nothing below it
        before = [name for name, _ in theirs.sections[:index]]
        places = [place for place, (name, _) in enumerate(merged, start=1) if name in before]
        merged.insert(max(places, default=len(merged) if before or heading else 0), (heading, text))
    return merged


def _merged_front_matter(ours: _Card, theirs: _Card, given: frozenset[str]) -> dict[str, Any]:
    """The generated keys, and what people added or changed."""
    known: dict[str, str] = theirs.record.get("keys", {}) if theirs.record else {}
    is_ours = LIBRARY_TAG in (theirs.front_matter.get("tags") or [])
    merged = dict(ours.front_matter)
    for key, value in theirs.front_matter.items():
        generated = known.get(key) == _digest(value)
        if key == "tags":
            added = [tag for tag in value or [] if tag not in GENERATED_TAGS and tag not in merged.get("tags", [])]
            merged["tags"] = [*merged.get("tags", []), *added]
        elif (
            generated
            or key in given
            or (key in _OF_THE_RUN and (key in merged or (is_ours and theirs.record is None)))
        ):
            continue
        elif value is not None and merged.get(key) != value:
            if key in merged or key == "license":
                theirs.notes.append(f"{key} stays {value!r}, as the card on the Hub has it")
            merged[key] = value
    return merged


def _write(front_matter: dict[str, Any], sections: list[tuple[str, str]], record: dict[str, Any], tail: str) -> str:
    import yaml

    head = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)
    body = "\n\n".join(text for _, text in sections)
    comment = f"<!-- hf_imgproc_attn: generated {json.dumps(record)} -->"
    return f"---\n{head}---\n\n{body}\n\n{comment}\n" + (f"\n{tail}\n" if tail else "")


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
