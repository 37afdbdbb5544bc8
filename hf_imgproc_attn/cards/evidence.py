"""What studies with several seeds say of a card's preset, on the data that its run was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..shipped_files import shipped_file
from .results import METRICS, PARTS

STUDIES = "results/study"
"""Folder of the ledgers, beside the training scripts."""


def evidence(record: dict[str, Any], preset: str, studies: Path | None = None) -> list[str]:
    """A sentence for each study whose report compares the preset with its baseline on the run's training data.

    Args:
        record: of the run.
        preset: the run's.
        studies: folder with a ledger for each study; None: those of this package, where they are installed.
    """
    data = record.get("data_fingerprint", {}).get("train")
    folder = studies or shipped_file("training/train_causal_lm.py").parent / STUDIES
    if data is None:
        return []
    return [
        _sentence(report, table, row)
        for report in _reports(folder)
        for table in report["tables"]
        if table["family"] == "clean" and table["split"] == "test" and report["data"].get(table["task"]) == data
        for row in table["rows"]
        if row["variant"] == preset and row["difference"] is not None
    ]


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/report.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def _sentence(report: dict[str, Any], table: dict[str, Any], row: dict[str, Any]) -> str:
    summary, metric = row["difference"]["summary"], table["metric"]
    scale, unit = (100, "points of ") if metric in PARTS else (1, "")
    count = len(summary["values"])
    low, high = summary["t_interval"]["low"], summary["t_interval"]["high"]
    interval = "" if low is None or high is None else f" (95 % interval {scale * low:+.2f} to {scale * high:+.2f})"
    return (
        f"With {count} seed{'' if count == 1 else 's'} on these data (study `{report['study']}`, whose recipe may "
        "differ) "
        f"`{row['variant']}` minus `{report['baseline']}` is {scale * summary['mean']:+.2f} {unit}"
        f"{METRICS[metric]}{interval}: {row['verdict']}."
    )
