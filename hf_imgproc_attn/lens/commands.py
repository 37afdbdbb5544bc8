"""``imgproc-attn lens``: options here, without torch, and the work elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FILES = ("lens.json", "lens.md", "lens.html")
"""What the command writes, beside one PNG a panel."""


def add_commands(commands: Any) -> None:
    """Add the sub-command to the parser of ``imgproc-attn``."""
    lens = commands.add_parser(
        "lens",
        help="see what the attention of a trained model filters: numbers, pictures, a page for the browser",
        description="Measure what the self-attention of checkpoints filters, of language or vision: "
        "bandwidths, entropy, sinks, spectra, how alike tokens become by depth, what noise does, and what each token "
        "receives from where. Several checkpoints are compared on the same input. Writes JSON, Markdown, PNG and one "
        "HTML page that needs no network.",
    )
    lens.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a Hub name")
    lens.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="texts, token numbers (JSON: a list of lists) or images"
    )
    lens.add_argument(
        "--data",
        default="auto",
        metavar="NAME",
        help="without --input: pydoc (the manual inside Python), own (texts that the model writes), random, "
        "photographs or digits (default: the first that fits the model)",
    )
    lens.add_argument("--samples", type=int, default=16, help="texts or images (default: %(default)s)")
    lens.add_argument(
        "--beside",
        type=int,
        default=0,
        metavar="N",
        help="with --input: so many samples of real data behind it, which let position and content be told apart "
        "where there is a single image or a short text",
    )
    lens.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: 64)")
    lens.add_argument("--stack", help="which list of layers, where a model has several (encoder.block, ...)")
    lens.add_argument("--token", type=int, metavar="I", help="whose maps are shown (default: one in the middle)")
    lens.add_argument(
        "--noise", type=float, default=0.1, help="in the input, as a share of its deviation; 0: none (default: 0.1)"
    )
    lens.add_argument(
        "--spectra",
        default="dense",
        help="dense (up to 1,024 tokens), iterative (the largest values also beyond) or none (default: %(default)s)",
    )
    lens.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the noise, and of drawn texts, tokens and pixels (default: %(default)s)",
    )
    lens.add_argument(
        "--output", type=Path, default=Path("outputs/lens"), metavar="DIR", help="(default: %(default)s)"
    )
    lens.add_argument("--force", action="store_true", help="replace the files of an earlier look in DIR")
    lens.set_defaults(run_command=run_lens)

    app = commands.add_parser(
        "app",
        help="the lens in the browser: choose a checkpoint, type a text or upload an image, see what it filters",
        description="Serve the lens as an app for the browser, on this machine only, until it is interrupted: choose "
        "a checkpoint, or put a preset's filters into it, type a text or upload an image, and see maps and measures.",
    )
    app.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints that are offered: folders or Hub names")
    app.add_argument("--port", type=int, metavar="N", help="(default: the first free one from 7860 on)")
    app.set_defaults(run_command=run_app)


def run_lens(options: argparse.Namespace) -> int:
    """``imgproc-attn lens``: measure, write, and print the summary."""
    from ..errors import require_extras
    from ..output_paths import check_new_files, check_output_folder

    require_extras("lens")
    check_output_folder(options.output)
    check_new_files([options.output / name for name in FILES], options.force)

    from .compare import look, refuse_the_same, summary, write

    refuse_the_same(options.models)
    reports = look(options)
    write(reports, options.output)
    print(summary(reports))
    print(f"the page is {options.output / 'lens.html'}")
    return 0


def run_app(options: argparse.Namespace) -> int:
    """``imgproc-attn app``: serve the app."""
    from ..errors import UsageError, refuse_missing_path, require_extras

    if options.port is not None and not 1 <= options.port <= 65535:
        raise UsageError(f"port must be an integer from 1 to 65535, got {options.port}")
    for name in options.models:
        refuse_missing_path("MODEL", name)
    require_extras("lens", "app")

    from .app import serve
    from .compare import own_names
    from .real_models import packaged_models

    packaged = {name: folder for name, (folder, _) in packaged_models().items()}
    named = dict(zip(own_names(options.models), options.models, strict=True))
    serve(named or packaged, options.port)
    return 0
