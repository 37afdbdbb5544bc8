"""What the filters cost: every path against stock attention, interleaved in one run, as ratios with their spread.

Suites: ``attention`` (plain tensors: back-ends, published algorithms, over lengths), ``axes`` (one attention with each
value of the axes; float32 on the CPU), ``padding`` (batches with and without it; likewise), ``decode`` (one token with
a cache), ``layers`` (the attention module of every preset) and ``models`` (training steps and generation). A path
whose results are wrong is not timed, and what would take too long or too much memory is skipped; both are named.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from ...errors import UsageError, did_you_mean, require_extras
from ...output_paths import check_new_files, write_or_keep
from ...records import device_description, git_state, package_versions, write_json
from . import attention, axes, decoding, layers, padded, whole_models
from .attention import Limits
from .report import draw, goals_table, render, slope_rows
from .timing import Row

SUITES = ("attention", "axes", "padding", "decode", "layers", "models")
LIMITS = Limits(seconds=20.0, mib=None, budget=40.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(
    *,
    suites: Sequence[str] = SUITES,
    quick: bool = False,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    lengths: Sequence[int] | None = None,
    limits: Limits = LIMITS,
    output: str | Path | None = None,
    force: bool = False,
    merge: bool = False,
) -> dict[str, Any]:
    """Run suites, print tables, write JSON and a plot beside it.

    Args:
        suites: names among :data:`SUITES`.
        quick: tiny shapes and few rounds; checks that everything runs, the ratios mean nothing.
        threads: CPU threads for torch, restored afterwards; None leaves torch's choice.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or a CUDA device.
        lengths: of the sweep over N; None: powers of two from 64 to 16,384.
        limits: methods with a higher estimate of one call's seconds or MiB (None: half of what is free) are skipped;
            ``budget`` is the seconds that the rounds of one table may take.
        output: a JSON file; None writes none. The plot of the attention suite has its name with ``.png``.
        force: replace files that are there.
        merge: put the rows into the record at ``output``, whose other suites stay; ``kept`` then says which, with the
            versions and the source that they were measured with.

    Returns:
        The record: settings, versions, device and ``rows``, one dictionary for each :class:`Row`.

    Raises:
        UsageError: for an unknown suite or dtype, a device that is not there, (without ``force`` and ``merge``) an
            output that is, or with ``merge`` one of other settings or none.
        KeyboardInterrupt: after Ctrl-C, once what was measured by then is printed and written, marked as ``partial``,
            to :func:`partial_file`; a record of an earlier call stays.
    """
    for suite in suites:
        if suite not in SUITES:
            hint = did_you_mean(suite, SUITES)
            raise UsageError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}{hint}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"device must be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device must be there, got {device!r}, and torch sees no GPU")
    if output is not None:  # before minutes of work whose results could not be written
        require_extras("viz")
        check_new_files(output_files(output, suites), force or merge)
    settings = {"quick": quick, "partial": False, "dtype": dtype, "threads": threads or torch.get_num_threads()}
    earlier = _earlier(output, settings) if merge else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    started = time.perf_counter()
    limits = replace(limits, budget=0.0) if quick else limits
    rows: list[dict[str, Any]] = []
    interrupt: KeyboardInterrupt | None = None
    try:
        description = device_description(torch.device(device), 1)
        for suite in suites:
            for row in _rows(suite, quick, DTYPES[dtype], device, lengths, limits):
                rows.append(asdict(row))
    except KeyboardInterrupt as error:
        if not rows:
            raise
        interrupt = error
    finally:
        torch.set_num_threads(before)
    record: dict[str, Any] = {
        "quick": quick,
        "partial": interrupt is not None,
        "dtype": dtype,
        "device": description,
        "threads": description["threads"],
        "versions": package_versions(),
        "git": git_state(),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    print(render(rows))
    if earlier is not None and interrupt is None:
        _merge(record, earlier)
    record["slopes"] = slope_rows(record["rows"])
    for item in record["slopes"]:
        print(f"{item['kind']}, {item['method']}, {item['direction']}: {item['value']} grows as N^{item['exponent']}")
    if not quick:
        print(f"\n{goals_table(record)}\n")
    if output is not None:
        path = Path(output) if interrupt is None else partial_file(output)
        write_or_keep(path, lambda file: write_json(file, record))
        if "attention" in suites and interrupt is None:
            write_or_keep(path.with_suffix(".png"), lambda file: draw(record["rows"], file))
        print(f"written to {path}")
    if interrupt is not None:
        raise interrupt
    return record


def _earlier(output: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The record that new rows are put into.

    Raises:
        UsageError: if there is none, or its settings are others: rows of two kinds would stand in one table.
    """
    try:
        earlier = json.loads(Path(output or "").read_text(encoding="utf-8"))
        unknown = {row["suite"] for row in earlier["rows"]} - set(SUITES)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"merge needs a record of a benchmark at output, got {str(output)!r}: {error!r}") from error
    if unknown:
        raise UsageError(f"merge needs suites among {', '.join(SUITES)}, got {', '.join(sorted(unknown))} in {output}")
    for name, value in settings.items():
        if earlier.get(name, False) != value:
            raise UsageError(f"merge needs a record with {name} {value!r}, got {earlier.get(name)!r} in {output}")
    return cast(dict[str, Any], earlier)


def _merge(record: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Put the rows of suites that were not run again into a record, and what they were measured with."""
    again = {row["suite"] for row in record["rows"]}
    rows = [*(row for row in earlier["rows"] if row["suite"] not in again), *record["rows"]]
    record["rows"] = sorted(rows, key=lambda row: SUITES.index(row["suite"]))
    of_suites = {suite: found for found in earlier.get("kept", []) for suite in found["suites"]}
    kept: list[dict[str, Any]] = []
    for suite in dict.fromkeys(row["suite"] for row in record["rows"] if row["suite"] not in again):
        found = of_suites.get(suite, earlier)
        kept.append({"suites": [suite], **{name: found[name] for name in ("versions", "git", "device", "seconds")}})
    record["kept"] = kept


def partial_file(output: str | Path) -> Path:
    """Where the record of an interrupted benchmark is: ``costs.json`` -> ``costs.partial.json``; replaced."""
    path = Path(output)
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def output_files(output: str | Path, suites: Sequence[str]) -> list[Path]:
    """What is written: the record and, where the suite that it shows is run, the plot.

    Raises:
        UsageError: if the two would be one file.
    """
    record, plot = Path(output), Path(output).with_suffix(".png")
    if record == plot:
        raise UsageError(f"output must not end in .png, as the plot beside it does, got {str(output)!r}")
    return [record, plot] if "attention" in suites else [record]


def _rows(
    suite: str, quick: bool, dtype: torch.dtype, device: str, lengths: Sequence[int] | None, limits: Limits
) -> Iterator[Row]:
    """The rows of one suite; what is being timed is said on standard error."""

    def say(text: str) -> None:
        print(f"timing {text} ...", file=sys.stderr, flush=True)

    if suite == "attention":
        named = attention.GPU_GOALS if device.startswith("cuda") else attention.GOALS
        over = lengths or attention.LENGTHS
        shapes = [*named, *attention.sweep(over, True), *attention.sweep(over, False)]
        if quick:
            shapes = [*attention.sweep((48, 96), True), *attention.sweep((33,), False)]
        yield from attention.run_attention(shapes, dtype=dtype, device=device, limits=limits, say=say)
    elif suite == "axes":
        for size in axes.QUICK if quick else axes.SHAPES:
            yield from axes.run_axes(size, budget=limits.budget, say=say)
    elif suite == "padding":
        for size in padded.QUICK if quick else padded.SHAPES:
            yield from padded.run_padded(size, budget=limits.budget, say=say)
    elif suite == "decode":
        length = 48 if quick else 1024
        sizes = {
            **(whole_models.GPT2_TINY if quick else whole_models.GPT2_SMALL),
            "n_positions": length + decoding.STEPS,
        }
        yield from decoding.run_decoding(length, fields=sizes, device=device, budget=limits.budget, say=say)
    elif suite == "layers":
        for shape in layers.QUICK if quick else layers.FULL:
            yield from layers.run_layers(shape, budget=limits.budget, say=say)
    else:
        yield from whole_models.run_models(
            gpt2=whole_models.GPT2_TINY if quick else whole_models.GPT2_SMALL,
            vit=whole_models.VIT_TINY if quick else whole_models.VIT_BASE,
            batch=2 if quick else 4,
            new_tokens=4 if quick else 32,
            device=device,
            dtype=dtype,
            budget=limits.budget,
            say=say,
        )
