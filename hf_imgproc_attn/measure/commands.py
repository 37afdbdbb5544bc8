"""``imgproc-attn precision``, ``compatibility`` and ``calls``: options here, without torch, and the work elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the sub-commands to the parser of ``imgproc-attn``."""
    precision = commands.add_parser(
        "precision",
        help="measure how each kernel rounds, beside plain attention",
        description="Measure the errors of each kernel and booster in float32 and bfloat16, as multiples of those of "
        "plain attention, and write them as a Markdown page. Takes minutes.",
    )
    precision.add_argument("output", type=Path, help="the Markdown file to write")
    precision.add_argument("--force", action="store_true", help="replace a file that is there")
    precision.set_defaults(run_command=run_precision)

    compatibility = commands.add_parser(
        "compatibility",
        help="measure what every preset works with: export, PEFT, empty batches",
        description="Export, tune and feed tiny models of every preset, and write the table of what works, and what "
        "is refused and why, between the marks of a Markdown page, whose rest stays. Takes minutes, and needs PEFT.",
    )
    compatibility.add_argument("page", type=Path, help="the Markdown file that has the table")
    compatibility.set_defaults(run_command=run_compatibility)

    calls = commands.add_parser(
        "calls",
        help="count the functions that one attention layer's call passes through",
        description="Count the package's own functions that run between an attention layer's tokens and its output: "
        "numbers to keep small when the core is changed.",
    )
    calls.add_argument("--list", action="store_true", help="list the functions too, with how often each runs")
    calls.set_defaults(run_command=run_calls)


def run_precision(options: argparse.Namespace) -> int:
    """``imgproc-attn precision``."""
    from .precision import write

    write(options.output, force=options.force)
    return 0


def run_compatibility(options: argparse.Namespace) -> int:
    """``imgproc-attn compatibility``."""
    from .compatibility import write

    write(options.page)
    return 0


def run_calls(options: argparse.Namespace) -> int:
    """``imgproc-attn calls``."""
    from .calls import report

    print(report(with_list=options.list))
    return 0
