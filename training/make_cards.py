"""Render model_cards/NAME.md of every training/results/NAME.json, beside the softmax run of the same recipe.

python training/make_cards.py --force
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.errors import OneLineParser, exit_code
from hf_imgproc_attn.output_paths import check_new_files, check_output_folder, writing

OWNER = "hf-imgproc-attn"
REVISION = "not-published"
"""These cards show how a card looks; their checkpoints are not published, and each says so."""
BASELINE = "softmax"
LICENSE = "apache-2.0"
"""What this project's own checkpoints are under: trained from scratch, on data that come with Python packages."""


def render_all(results: Path) -> dict[str, str]:
    """The cards of all results files in a folder: name -> text.

    Raises:
        UsageError: for a file that is no results file, or a baseline of another recipe.
    """
    cards = {}
    for path in sorted(results.glob("*.json")):
        run = load_results(path)
        preset = run.record["arguments"]["model"]["preset"]
        stock = path.with_name(f"{path.stem.removesuffix(preset)}{BASELINE}.json")
        baseline = load_results(stock) if preset != BASELINE and stock.exists() else None
        cards[path.stem] = render_card(
            run,
            repo_id=f"{OWNER}/{path.stem}",
            revision=REVISION,
            baseline=baseline,
            license=LICENSE,
            example=True,
        )
    return cards


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("training/results"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("model_cards"), metavar="DIR")
    parser.add_argument("--force", action="store_true", help="replace cards that are there")

    def work() -> None:
        options = parser.parse_args(argv)
        folder: Path = check_output_folder(options.output)
        cards = {folder / f"{name}.md": text for name, text in render_all(options.results).items()}
        check_new_files(cards, options.force)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in cards.items():
                path.write_text(text, encoding="utf-8")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
