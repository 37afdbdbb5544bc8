"""The command line ``imgproc-attn``: train, evaluate, convert, benchmark, check a GPU, denoise, publish, download ...

What a sub-command needs is imported when it runs, so ``--help`` does not wait for torch. A mistake of the user ends in
one line on standard error and exit status 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .backbones import TASKS, in_words
from .conversion_command import add_command as add_convert
from .errors import (
    OneLineParser,
    UsageError,
    disk_problem,
    plain_message,
    require_extras,
    with_values_joined,
)
from .hub.commands import add_commands as add_hub_commands
from .lens.commands import add_commands as add_lens
from .measure.commands import add_commands as add_measuring_commands
from .measure.gpu_check.command import add_command as add_gpu_check
from .output_paths import check_new_files, check_output_folder
from .robustness.command import add_command as add_robustness
from .shipped_files import shipped_file
from .study.command import add_command as add_study

TRAINING_SCRIPTS = {
    **{task.command: (task.script, f"train or fine-tune {task.help}") for task in TASKS.values()},
    "evaluate": ("evaluate_checkpoint", "evaluate a finished run on clean and on disturbed test data"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program name; None: those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: with status 2 on a usage error, 0 after ``--help`` or ``--version``; a training script's own exit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A training script parses its own options, --help included, so its arguments must not meet our parser.
    if arguments and arguments[0] in TRAINING_SCRIPTS:
        return run_training_script(arguments[0], arguments[1:])
    try:
        options = build_parser().parse_args(with_values_joined(arguments, ("--layers",)))
        status: int = options.run_command(options)
        sys.stdout.flush()
    except UsageError as error:
        _refuse(plain_message(error))
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        _discard_output()
        return 0
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        _discard_output()
        _refuse(problem)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but the training scripts' own options."""
    parser = OneLineParser(
        prog="imgproc-attn", description=f"Self-attention as image filtering: bilateral and twicing {in_words()}."
    )
    parser.add_argument("--version", action="version", version=f"imgproc-attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, (script, text) in TRAINING_SCRIPTS.items():
        commands.add_parser(
            name, help=f"{text} (options: imgproc-attn {name} --help)", description=f"Runs {script}.py."
        )

    add_convert(commands)

    presets = commands.add_parser("presets", help="list the variants", description="List the variants.")
    presets.set_defaults(run_command=run_presets)

    variants = commands.add_parser(
        "variants",
        help="describe every preset: equation, source, parameters, cost, limits",
        description="Describe every preset: equation, source, parameters, cost and limits.",
    )
    variants.add_argument("--markdown", action="store_true", help="as one Markdown table")
    variants.set_defaults(run_command=run_variants)

    benchmark = commands.add_parser(
        "benchmark",
        help="time filters, layers, decoding and whole models against stock attention",
        description="Time filters, layers, decoding and whole models, as ratios to stock attention in the same run. "
        "The full run takes the better part of an hour on two cores.",
    )
    benchmark.add_argument(
        "--suite", nargs="+", metavar="NAME", help="attention, axes, padding, decode, layers, models (default: all)"
    )
    benchmark.add_argument(
        "--quick", action="store_true", help="tiny shapes and few repetitions: a check, not a result"
    )
    benchmark.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    benchmark.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    benchmark.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    benchmark.add_argument("--lengths", nargs="+", type=int, metavar="N", help="of the sweep (default: 64 to 16384)")
    benchmark.add_argument(
        "--max-seconds", type=float, default=20.0, help="skip what is estimated to take longer (default: %(default)s)"
    )
    benchmark.add_argument(
        "--max-mib", type=float, default=None, help="likewise for memory (default: half of the free)"
    )
    benchmark.add_argument(
        "--budget", type=float, default=40.0, help="seconds for the rounds of a table (default: %(default)s)"
    )
    benchmark.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark.json"),
        metavar="FILE",
        help="the record; the plot is written beside it, as .png (default: %(default)s)",
    )
    benchmark.add_argument("--force", action="store_true", help="replace an earlier record and plot")
    benchmark.add_argument(
        "--merge", action="store_true", help="put the rows of --suite into the record that is there; others stay in it"
    )
    benchmark.add_argument(
        "--redraw",
        type=Path,
        metavar="FILE",
        help="measure nothing; draw the plot beside this record again, in place of the one that is there",
    )
    benchmark.set_defaults(run_command=run_benchmark)

    denoise = commands.add_parser(
        "denoise",
        help="remove noise from photographs with the filters",
        description="Filter photographs and boost the filter: with Gaussian noise added, to compare with the clean "
        "picture, or as they are (--noise 0). Writes a figure and a record. Colour is filtered as colour, an alpha "
        "channel is kept as it is. The bandwidths follow from the noise alone.",
    )
    denoise.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, or a photograph of scikit-image: camera, astronaut, coffee...",
    )
    denoise.add_argument("--preset", default="nlm", help="nlm or bilateral_gaussian (default: %(default)s)")
    denoise.add_argument(
        "--normalisation",
        nargs="+",
        default=["softmax"],
        metavar="NAME",
        help="softmax, sinkhorn, symmetric: one or several, to be compared (default: softmax)",
    )
    denoise.add_argument(
        "--noise",
        nargs="+",
        type=float,
        default=[10.0, 25.0, 50.0],
        metavar="SIGMA",
        help="standard deviations of the noise to add, in grey values of 0 to 255 whatever the depth; 0 adds none and "
        "removes the picture's own, whose strength is estimated (default: 10 25 50)",
    )
    denoise.add_argument(
        "--save", action="store_true", help="also write the filtered pictures, as PNG with the bit depth of the input"
    )
    denoise.add_argument("--crop", type=int, metavar="SIDE", help="cut a square out of the middle first")
    denoise.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    denoise.add_argument(
        "--output", type=Path, default=Path("outputs/denoising"), metavar="DIR", help="(default: %(default)s)"
    )
    denoise.add_argument(
        "--force", action="store_true", help="replace figure, record and pictures of an earlier run in DIR"
    )
    denoise.set_defaults(run_command=run_denoise)

    add_gpu_check(commands)
    add_lens(commands)
    add_measuring_commands(commands)
    add_robustness(commands)
    add_study(commands)
    add_hub_commands(commands)
    return parser


def run_training_script(command: str, arguments: Sequence[str]) -> int:
    """Run a shipped training script in this process, as if it had been started by hand.

    Raises:
        SystemExit: as the script does.
    """
    script = TRAINING_SCRIPTS[command][0]
    # What `python script.py` does: scripts import each other as siblings, and their usage text names the command.
    sys.path.insert(0, str(shipped_file(f"training/{script}.py").parent))
    sys.argv = [f"imgproc-attn {command}", *arguments]
    status: int = importlib.import_module(script).main(arguments)
    return status


def run_presets(options: argparse.Namespace) -> int:
    """``imgproc-attn presets``: the table of variants."""
    from .models.spec_fields import PRESETS, FilterSpecMixin

    fields = (
        "content_kernel",
        "position_kernel",
        "boosting",
        "residual",
        "feedback",
        "gate",
        "normalisation",
        "learn_bandwidths",
    )
    rows = [["preset", *fields]]
    for name, changes in PRESETS.items():
        rows.append([name, *(str(changes.get(field, getattr(FilterSpecMixin, field))) for field in fields)])
    _print_table(rows)
    return 0


def run_variants(options: argparse.Namespace) -> int:
    """``imgproc-attn variants``."""
    from .catalogue.table import LEGEND, markdown_table, plain_text

    text = f"{markdown_table()}\n\n{LEGEND}" if options.markdown else plain_text()
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))  # a pipe may have no room for formulas
    return 0


def run_benchmark(options: argparse.Namespace) -> int:
    """``imgproc-attn benchmark``."""
    if options.redraw is not None:
        require_extras("viz")
        from .measure.benchmark.report import redraw

        redraw(options.redraw)
        return 0
    if options.threads is not None and options.threads < 1:
        _refuse(f"--threads must be an integer >= 1, got {options.threads}")
    for length in options.lengths or []:
        if length < 2:
            _refuse(f"--lengths must be integers >= 2, got {length}")
    for name in ("max_seconds", "max_mib", "budget"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            _refuse(f"--{name.replace('_', '-')} must be a number > 0, got {value}")

    check_new_files([options.output], options.force or options.merge)
    require_extras("viz")  # before the seconds that importing torch takes

    from .measure.benchmark import SUITES, run
    from .measure.benchmark.attention import Limits

    run(
        suites=options.suite or SUITES,
        quick=options.quick,
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
        lengths=options.lengths,
        limits=Limits(options.max_seconds, options.max_mib, options.budget),
        output=options.output,
        force=options.force,
        merge=options.merge,
    )
    return 0


def run_denoise(options: argparse.Namespace) -> int:
    """``imgproc-attn denoise``: print the table, leave a figure and a record."""
    require_extras("filters")
    check_output_folder(options.output)

    from .images.denoising import run, table_rows

    record = run(
        options.images,
        preset=options.preset,
        normalisations=options.normalisation,
        noise=options.noise,
        output=options.output,
        crop=options.crop,
        seed=options.seed,
        save=options.save,
        force=options.force,
    )
    _print_table(table_rows(record))
    what = "figure, record and pictures" if options.save else "figure and record"
    print(f"PSNR in dB / SSIM; {what} are in {options.output}")
    return 0


def _discard_output() -> None:
    """Let what standard output still holds go nowhere, or the interpreter would fail on it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _refuse(message: str) -> NoReturn:
    """End the program with one line on standard error, also where a library's message has several."""
    print(f"imgproc-attn: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
