"""``imgproc-attn precision``, ``compatibility``, ``support``, ``calls``, ``context``: the options, without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..output_paths import check_new_files, write_or_keep


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

    support = commands.add_parser(
        "support",
        help="measure which models of Transformers can have a filter, and in which modes",
        description="Put filters into tiny models of many architectures, decode, compile, train and save them, and "
        "write the table of what works, and what is refused and why, between the marks of a Markdown page, whose rest "
        "stays. Takes minutes, and needs PEFT.",
    )
    support.add_argument("page", type=Path, help="the Markdown file that has the table")
    support.set_defaults(run_command=run_support)

    calls = commands.add_parser(
        "calls",
        help="count the functions that one attention layer's call passes through",
        description="Count the package's own functions that run between an attention layer's tokens and its output: "
        "numbers to keep small when the core is changed.",
    )
    calls.add_argument("--list", action="store_true", help="list the functions too, with how often each runs")
    calls.set_defaults(run_command=run_calls)

    context = commands.add_parser(
        "context",
        help="measure a language model's perplexity against the length of its context",
        description="Predict the same tokens of long documents with 128 tokens in the window, with 256, and so on: "
        "what the longer context gains, with intervals.",
    )
    context.add_argument("checkpoint", help="a causal language model with its tokenizer: a folder or a Hub name")
    context.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="documents in UTF-8, such as novels (default: Python's own manual)",
    )
    context.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens of the context, ascending (default: those of 128 to 4096 that model and text have room for)",
    )
    context.add_argument("--windows", type=int, default=32, help="places that are scored (default: %(default)s)")
    context.add_argument("--scored", type=int, default=32, help="tokens scored at each place (default: %(default)s)")
    context.add_argument("--output", type=Path, metavar="FILE", help="write the record there, as JSON")
    context.add_argument("--force", action="store_true", help="replace a file that is there")
    context.set_defaults(run_command=run_context)


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


def run_support(options: argparse.Namespace) -> int:
    """``imgproc-attn support``."""
    from .support import write

    write(options.page)
    return 0


def run_calls(options: argparse.Namespace) -> int:
    """``imgproc-attn calls``."""
    from .calls import report

    print(report(with_list=options.list))
    return 0


def run_context(options: argparse.Namespace) -> int:
    """``imgproc-attn context``."""
    from .context import Settings, measure, table

    settings = Settings(lengths=options.lengths, windows=options.windows, scored=options.scored)
    if options.output is not None:
        check_new_files([options.output], options.force)
    record = measure(options.checkpoint, options.text, settings)
    rows = table(record)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if options.output is not None:
        from ..records import write_json

        write_or_keep(options.output, lambda file: write_json(file, record))
    return 0
