"""Draw the plot of a benchmark's record again: ``python -m hf_imgproc_attn.measure.benchmark docs/benchmark.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import OneLineParser, UsageError, exit_code
from ...output_paths import check_output_file, write_or_keep
from .report import draw


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the plot beside the record that ``argv`` names, which all of it is made of; one that is there is replaced.

    Args:
        argv: the command line; None: that of this process.
    """
    parser = OneLineParser(
        prog="python -m hf_imgproc_attn.measure.benchmark", description="Draw the plot of a benchmark's record again."
    )
    parser.add_argument(
        "record", type=Path, help="a JSON file of `imgproc-attn benchmark`; the plot beside it is replaced"
    )

    def work() -> None:
        path: Path = parser.parse_args(argv).record
        plot = check_output_file(path.with_suffix(".png"))
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"record must be one of a benchmark, got {str(path)!r}: {error!r}") from error
        write_or_keep(plot, lambda file: draw(rows, file))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
