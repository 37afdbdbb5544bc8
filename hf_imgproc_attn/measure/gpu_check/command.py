"""``imgproc-attn gpu-check`` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...output_paths import check_output_file
from .parts import PARTS

RECORD = Path("docs/gpu.json")
REHEARSAL = Path("outputs/gpu_rehearsal.json")
DATA = Path("data/cifar10")


def add_command(commands: Any) -> None:
    """Add the sub-command to the parser of ``imgproc-attn``."""
    letters = ", ".join(f"{part.letter} ({part.title[0].lower()}{part.title[1:]})" for part in PARTS)
    command = commands.add_parser(
        "gpu-check",
        help="check and measure everything on a GPU, in minutes",
        description="Check the models and back-ends on a GPU against float64, and time them. "
        f"Parts, in order of value: {letters}. A failure is recorded and stops nothing else.",
    )
    command.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal (default: %(default)s)")
    command.add_argument(
        "--minutes", type=float, default=9.0, help="for everything, start-up included (default: %(default)s)"
    )
    command.add_argument("--parts", metavar="a,b,...", help="the parts to run (default: all)")
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the record, written after every case (default: {RECORD}; of a rehearsal {REHEARSAL})",
    )
    command.add_argument("--resume", action="store_true", help="go on where the last run ended")
    command.add_argument(
        "--retry", action="store_true", help="go on likewise, and run again what was wrong, failed or took too long"
    )
    command.add_argument(
        "--force", action="store_true", help="measure again, and replace the results of these parts that FILE has"
    )
    command.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="CIFAR-10 as train-*.parquet and test-*.parquet, for part e (default: %(default)s)",
    )
    command.add_argument(
        "--strict", action="store_true", help="exit status 1 if anything was not as it should be, or not reached"
    )
    command.add_argument(
        "--render",
        action="store_true",
        help="measure nothing; write docs/gpu.md, a paragraph of docs/compatibility.md and the table of back-ends "
        "from the record",
    )
    command.set_defaults(run_command=run_command)


def run_command(options: argparse.Namespace) -> int:
    """Run the check, or render what it found; without ``--strict`` 0 also where cases failed: the record says so.

    Raises:
        UsageError: for a wrong option.
    """
    if options.device not in ("cuda", "cpu"):
        raise UsageError(f"--device must be cuda or cpu, got {options.device!r}")
    if not 0 < options.minutes < float("inf"):
        raise UsageError(f"--minutes must be a number > 0, got {options.minutes}")
    output = options.output or (RECORD if options.device == "cuda" else REHEARSAL)
    if options.render:
        from .report import render

        if options.output is not None and not output.is_file():
            raise UsageError(f"--output must be a record of gpu-check, got {str(output)!r}, which is not there")
        for path in render(output):
            print(f"written: {path}")
        return 0
    check_output_file(output, "--output")
    from .report import is_complete, summary
    from .runner import run

    record = run(
        output=output,
        device=options.device,
        minutes=options.minutes,
        letters=None if options.parts is None else [letter.strip() for letter in options.parts.split(",")],
        resume=options.resume,
        retry=options.retry,
        force=options.force,
        data=options.data.resolve(),
    )
    print(summary(record))
    print(f"written to {output}")
    return 1 if options.strict and not is_complete(record) else 0
