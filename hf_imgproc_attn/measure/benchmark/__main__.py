"""Draw the plot of a benchmark's record again: ``python -m hf_imgproc_attn.measure.benchmark docs/benchmark.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import draw


def main(argv: Sequence[str]) -> None:
    """Draw the plot beside the record that ``argv`` names."""
    path = Path(argv[0])
    draw(json.loads(path.read_text(encoding="utf-8"))["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
