"""What the page about GPUs says while there is no record of one: what the rehearsal on a CPU ran."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...markdown_tables import table_lines
from .parts import BAD, MEASURED, PARTS

COMMAND = "imgproc-attn gpu-check --device cpu"
RECORD = "docs/gpu_rehearsal.json"


def read_rehearsal(root: Path) -> dict[str, Any] | None:
    """The committed record of a rehearsal; None where there is none.

    Args:
        root: of the checkout.

    Raises:
        UsageError: if it cannot be read.
    """
    path = root / RECORD
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{RECORD} must be a record of {COMMAND}: {error!r}") from error
    return record


def version_words(environment: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """``torch 2.11.0`` and so on, of those that a record's environment has."""
    versions = environment["versions"]
    return [f"{name} {versions[name]}" for name in names if versions.get(name)]


def commit_words(environment: dict[str, Any]) -> str:
    """Which source it was, as far as git knew."""
    git = environment.get("git")
    return f"commit {git['revision'][:12]}{' with changes' * git['dirty']}" if git else "no git there"


def rehearsal_lines(record: dict[str, Any] | None) -> list[str]:
    """Lines of Markdown: a row for each part, how many of its cases ran. No times: a rehearsal's mean nothing.

    Args:
        record: of ``gpu-check --device cpu``; None where there is none.
    """
    if record is None:
        return ["What will stand here:", "", *(f"- {part.title}" for part in PARTS)]
    environment = record["environment"]
    source = [commit_words(environment)] if environment.get("git") else []
    named = ", ".join([*version_words(environment, ("torch", "transformers", "triton")), *source])
    lines = [
        "What will stand here, and what a rehearsal of it on the CPU ran: the same code on tiny sizes, with Triton in",
        f"its interpreter ({named}).",
        "It shows that a part works, not that it is right or fast on a GPU.",
        "",
        "```bash",
        f"{COMMAND} --output {RECORD} --force",
        "```",
        "",
    ]
    rows = []
    for part in PARTS:
        entry = record["parts"].get(part.letter, {"cases": {}, "not_reached": None})
        counts = Counter(case["status"] for case in entry["cases"].values())
        bad = sum(counts[status] for status in BAD)
        left = "all" if entry["not_reached"] is None else str(len(entry["not_reached"]))
        rows.append([part.title, str(counts[MEASURED]), str(counts["refused"]), str(bad), left])
    return lines + table_lines(["part", "cases as they should be", "refused by name", "wrong", "not reached"], rows)
