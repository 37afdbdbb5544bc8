"""Record of a GPU check -> what it says: a summary, two pages of ``docs/``, the table of measured back-ends.

Nothing is written by hand: without a record each of them says "not measured".
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...markdown_tables import table_lines
from .choices import algorithms_source, cuda_choices
from .goals import decoding_rows, goal_lines
from .parts import BAD, MEASURED, PARTS, STATUSES
from .rehearsal import commit_words, read_rehearsal, rehearsal_lines, version_words

COMMAND = "imgproc-attn gpu-check"
ROOT = Path(__file__).resolve().parents[3]
PAGE, COMPATIBILITY = "docs/gpu.md", "docs/compatibility.md"
TABLE = "hf_imgproc_attn/models/backend_measured.py"
ALGORITHMS = "hf_imgproc_attn/gpu/measured.py"
PARAGRAPH_MARKS = ("<!-- gpu: begin -->\n", "\n<!-- gpu: end -->")
TABLE_MARKS = ("# measured: begin\n", "\n# measured: end")

Record = dict[str, Any]


def render(path: Path, root: Path = ROOT) -> list[Path]:
    """Write page, paragraph and tables of a checkout from a record; what is written is returned.

    Raises:
        UsageError: if the record cannot be read, or is of a rehearsal.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        is_cuda = record is None or record["environment"]["device"]["type"] == "cuda"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--output must be a record of gpu-check, got {str(path)!r}: {error!r}") from error
    if not is_cuda:
        raise UsageError(f"--output must be the record of a GPU, got {str(path)!r}, of a rehearsal on the CPU")
    (root / PAGE).write_text(page(record, read_rehearsal(root)), encoding="utf-8")
    replace_between(root / COMPATIBILITY, PARAGRAPH_MARKS, paragraph(record))
    replace_between(root / TABLE, TABLE_MARKS, table_source(record))
    replace_between(root / ALGORITHMS, TABLE_MARKS, algorithms_source(record))
    return [root / name for name in (PAGE, COMPATIBILITY, TABLE, ALGORITHMS)]


def replace_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Put a text between two marks of a file.

    Raises:
        UsageError: if the file does not have them.
    """
    before, first, rest = path.read_text(encoding="utf-8").partition(marks[0])
    _, second, after = rest.partition(marks[1])
    if not first or not second:
        raise UsageError(f"{path.name} must have the marks {marks[0].strip()} and {marks[1].strip()}")
    path.write_text(f"{before}{first}{text}{second}{after}", encoding="utf-8")


def summary(record: Record) -> str:
    """A few lines for the end of a run: what is bad first, then how many of each verdict."""
    lines = [
        f"part {letter}, {name}: {case['status']}: {(case.get('reason') or '').partition(chr(10))[0]}"
        for letter, part in sorted(record["parts"].items())
        for name, case in part["cases"].items()
        if case["status"] in BAD
    ]
    lines += [
        f"part {letter}: {_counts(part)}{_not_reached(part)}, {part['seconds']:.0f} s"
        for letter, part in sorted(record["parts"].items())
    ]
    lines += goal_lines(record)
    return "\n".join(lines)


def is_complete(record: Record) -> bool:
    """Whether every part was run to its end, and every case is as it should be or refused."""
    return all(
        part["cases"]
        and part["not_reached"] == []
        and not any(case["status"] in BAD for case in part["cases"].values())
        for part in record["parts"].values()
    )


def page(record: Record | None, rehearsed: Record | None = None) -> str:
    """``docs/gpu.md``: from a GPU's record, or from that of a rehearsal where there is none."""
    lines = ["# On a GPU", "", "Written from `docs/gpu.json`, which this command makes on a machine with a GPU:", ""]
    lines += ["```bash", COMMAND, f"{COMMAND} --render", "```", ""]
    if record is None:
        lines += ["Not measured: this version of the package has not yet run on a GPU.", ""]
        return "\n".join([*lines, *rehearsal_lines(rehearsed), ""])
    lines += [_what_was_measured(record), ""]
    lines += ["What it is to reach, × plain attention or the stock model:", ""]
    lines += [*(f"- {line}" for line in goal_lines(record)), ""]
    for part in PARTS:
        entry = record["parts"].get(part.letter)
        lines += [f"## {part.title}", ""]
        if entry is None or not entry["cases"]:
            lines += ["Not measured.", ""]
            continue
        lines += [f"{_counts(entry)}{_not_reached(entry)}, in {entry['seconds']:.0f} s.", ""]
        lines += _TABLES[part.letter](entry["cases"])
        lines += _bad(entry["cases"])
    return "\n".join(lines).rstrip() + "\n"


def paragraph(record: Record | None) -> str:
    """What ``docs/compatibility.md`` says about GPUs."""
    if record is None:
        return (
            f"On a GPU: not measured. `{COMMAND}` checks models and back-ends there and times them, in nine\n"
            "minutes; what it finds will stand in [On a GPU](gpu.md)."
        )
    cases = [case for part in record["parts"].values() for case in part["cases"].values()]
    right = sum(case["status"] == MEASURED for case in cases)
    bad = sum(case["status"] in BAD for case in cases)
    device = record["environment"]["device"]["name"]
    lines = [
        f"On a GPU ({device}, torch {record['environment']['versions']['torch']}): of {right + bad} checks {right} "
        f"came out as they should and {bad} did not;",
        f"[On a GPU](gpu.md) has them all, and the times, made by `{COMMAND}`.",
    ]
    fastest = _fastest_twicing(record)
    if fastest:
        lines += ["Twicing by the fastest back-end, × plain attention, forward / forward + backward:"]
        lines += [f"{'; '.join(fastest)}."]
    return "\n".join(lines)


def table_source(record: Record | None) -> str:
    """The measured rows as Python, for ``models/backend_measured.py``."""
    rows = cuda_choices(record)
    if not rows:
        return "MEASURED: tuple[Row, ...] = ()"
    lines = []
    for row in rows:
        order = ", ".join(f'"{name}"' for name in row.order)
        lines.append(f'    ("{row.kind}", {row.is_causal}, {row.backward}, {row.length}, {row.head_dim}, ({order})),')
    return "\n".join(["MEASURED: tuple[Row, ...] = (", *lines, ")"])


def _what_was_measured(record: Record) -> str:
    environment = record["environment"]
    device = environment["device"]
    words = [device["name"], *version_words(environment, ("python", "torch", "transformers", "triton"))]
    words += [f"{name} {device[key]}" for name, key in (("CUDA", "cuda"), ("cuDNN", "cudnn")) if device.get(key)]
    if "memory_gib" in device:
        words.append(f"{device['memory_gib']} GiB")
    if environment.get("current_flash_attention_impl"):
        words.append(f"flash attention by {environment['current_flash_attention_impl']}")
    source = commit_words(environment)
    return f"{', '.join(words)}; {source}, SHA-256 of the package's files {environment['source_sha256'][:12]}."


def _counts(part: dict[str, Any]) -> str:
    counts = Counter(case["status"] for case in part["cases"].values())
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]) or "no cases"


def _not_reached(part: dict[str, Any]) -> str:
    if part.get("failure"):
        return "; a worker could not be started"
    if part.get("not_reached") is None:
        return "; not reached in the time given"
    return f", {len(part['not_reached'])} not reached" if part["not_reached"] else ""


def _bad(cases: dict[str, Any]) -> list[str]:
    lines = [
        f"- {name}: **{case['status']}**. {_cell((case.get('reason') or '').partition(chr(10))[0])}"
        for name, case in cases.items()
        if case["status"] in BAD
    ]
    return ["What did not come out as it should:", "", *lines, ""] if lines else []


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:300]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    return [*table_lines(header, rows), ""]


def _measured(cases: dict[str, Any], **about: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [
        (case["about"], case["values"])
        for case in cases.values()
        if case["status"] == MEASURED and all(case["about"].get(name) == value for name, value in about.items())
    ]


def _models_table(cases: dict[str, Any]) -> list[str]:
    lines = [
        "Relative error of logits / of all gradients against float64, as multiples of the stock model's:",
        "",
    ]
    rows = [
        [
            f"`{about['preset']}`",
            about["backbone"],
            *(f"{found['logits_multiple']:.1f} / {found['gradients_multiple']:.1f}" for found in values.values()),
        ]
        for about, values in _measured(cases, what="all modes")
    ]
    modes = next((list(values) for _, values in _measured(cases, what="all modes")), [])
    lines += _table(["preset", "backbone", *modes], rows)
    others = [
        f"{about['what']}, {about['backbone']} `{about['preset']}`"
        for what in ("training", "gradient checkpointing", "torch.compile")
        for about, _ in _measured(cases, what=what)
    ]
    generated = [f"`{about['preset']}`" for about, _ in _measured(cases, what="generation")]
    lines += [f"Also as it should: {'; '.join(others)}.", ""] if others else []
    lines += [f"Generation with a cache: {', '.join(generated)}.", ""] if generated else []
    return lines


def _backends_table(cases: dict[str, Any]) -> list[str]:
    lines = [
        "Largest error of output, dQ, dK, dV and the gradient of a position kernel's parameter against float64, as a "
        "multiple of plain attention's own:",
        "",
    ]
    rows = [
        [
            about["method"],
            about["filter"],
            _shape(about),
            about["dtype"],
            f"{max(values['multiples'].values()):.1f}",
        ]
        for about, values in _measured(cases)
    ]
    refused = [f"{name}: {_cell(case['reason'])}" for name, case in cases.items() if case["status"] == "refused"]
    lines += _table(["method", "filter", "shape", "dtype", "× plain"], rows)
    return lines + (["Refused:", "", *(f"- {text}" for text in refused), ""] if refused else [])


def _any_model_table(cases: dict[str, Any]) -> list[str]:
    lines = [
        "Stock classes with `apply_filter`; relative error of the output / of all gradients against float64, as "
        "multiples of those of the same model without a filter:",
        "",
    ]
    filtered = _measured(cases, what="filtered model")
    rows = [
        [
            about["model"],
            about["filter"],
            *(f"{found['output_multiple']:.1f} / {found['gradients_multiple']:.1f}" for found in values.values()),
        ]
        for about, values in filtered
    ]
    lines += _table(["model", "filter", *next((list(values) for _, values in filtered), [])], rows)
    decoded = [f"{about['model']}, {about['cache']}" for about, _ in _measured(cases, what="decoding")]
    lines += [f"Decoding as without a cache: {'; '.join(decoded)}.", ""] if decoded else []
    for _, values in _measured(cases, what="attacks"):
        same = min(values["fgsm_same_as_cpu"], values["pgd_same_as_cpu"])
        lines += [f"Verdicts of FGSM and PGD that are those of the CPU: {100 * same:.0f} %.", ""]
    for _, values in _measured(cases, what="measures of heads"):
        lines += [f"Largest relative error of the lens's measures of heads: {max(values.values()):.1e}.", ""]
    return lines


def _times_table(cases: dict[str, Any]) -> list[str]:
    lines = [
        "bfloat16, × plain SDPA in the same rounds (quartiles); TFLOP/s count the least work of the filter:",
        "",
    ]
    rows, graphs = [], []
    for about, values in _measured(cases):
        if "directions" in values:
            forward, both = (values["directions"][name] for name in ("forward", "forward + backward"))
            rows.append(
                [
                    about["filter"],
                    about["backend"],
                    _shape(about),
                    *(_ratio(found) for found in (forward, both)),
                    f"{forward['milliseconds']:.3g} / {both['milliseconds']:.3g}",
                    f"{forward['tflops']:.0f} / {both['tflops']:.0f}",
                    f"{forward['plain_tflops']:.0f} / {both['plain_tflops']:.0f}",
                    f"{both['peak_mib']:,.0f} / {both['plain_peak_mib']:,.0f}",
                ]
            )
        elif about.get("graph") and about.get("what") != "decoding":
            graphs.append(
                [about["filter"], about["backend"], _shape(about), _ratio(values), f"{values['milliseconds']:.3g}"]
            )
    header = ["filter", "back-end", "shape", "forward", "forward + backward", "ms", "TFLOP/s", "plain TFLOP/s"]
    lines += _table([*header, "peak MiB, itself / plain"], rows)
    if graphs:
        lines += ["Forward as a CUDA graph, where nothing has to be launched:", ""]
        lines += _table(["filter", "back-end", "shape", "forward", "ms"], graphs)
    tokens = decoding_rows(cases)
    if tokens:
        lines += ["One token of twicing against a cache, × one plain call:", ""]
        lines += _table(["method", "shape", "how", "× plain", "µs, itself / plain"], tokens)
    for _, chosen in _measured(cases, what="choice"):
        lines += [f"Plain SDPA chose: {'; '.join(f'{name} at {shape}' for shape, name in chosen.items())}.", ""]
    for _, kernels in _measured(cases, what="kernels"):
        lines += [
            "Kernels that it ran:",
            "",
            *(f"- {shape}: {_cell(', '.join(names))}" for shape, names in kernels.items()),
            "",
        ]
    return lines


def _steps_table(cases: dict[str, Any]) -> list[str]:
    lines = [
        "× the stock model in the same rounds (quartiles); bfloat16, in training by autocast:",
        "",
    ]
    rows = [
        [
            about["model"],
            about["what"],
            values["work"],
            about["variant"],
            "compiled" if about["compiled"] else "eager",
            _ratio(values),
            f"{values['milliseconds']:.3g} / {values['stock_milliseconds']:.3g}",
        ]
        for about, values in _measured(cases)
    ]
    return lines + _table(["model", "what", "work", "variant", "", "× stock", "ms, itself / stock"], rows)


def _training_table(cases: dict[str, Any]) -> list[str]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for about, values in _measured(cases):
        if "preset" in about:
            runs.setdefault(about["preset"], []).append(values)
    if not runs:
        return ["Not measured: " + "; ".join(sorted({_cell(case.get("reason") or "") for case in cases.values()})), ""]
    speed = cases["speed"]["values"]
    columns = [name for name in next(iter(runs.values()))[0] if name not in ("epochs", "training_seconds")]
    lines = [
        f"CIFAR-10, {speed['train_images']:,} training images, {speed['epochs']} epochs; accuracy on "
        f"{speed['test_images']:,} test images in %, mean over the seeds (lowest to highest):",
        "",
    ]
    rows = []
    for preset, found in runs.items():
        cells = [_spread([100 * run[name] for run in found]) for name in columns]
        rows.append([f"`{preset}`", f"{speed['parameters'][preset]:,}", str(len(found)), *cells])
    return lines + _table(["preset", "parameters", "seeds", *columns], rows)


_TABLES = {
    "a": _models_table,
    "b": _backends_table,
    "f": _any_model_table,
    "c": _times_table,
    "d": _steps_table,
    "e": _training_table,
}


def _spread(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def _shape(about: dict[str, Any]) -> str:
    return f"{'causal' if about['is_causal'] else 'bidirectional'} {tuple(about['shape'])}"


def _ratio(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"


def _fastest_twicing(record: Record) -> list[str]:
    best: dict[str, tuple[float, str]] = {}
    for about, values in _measured(record["parts"].get("c", {}).get("cases", {}), filter="twicing", graph=False):
        both, forward = (values["directions"][name]["ratio"] for name in ("forward + backward", "forward"))
        text = f"{forward:.2f} / {both:.2f} by `{about['backend']}` at {_shape(about)}"
        best[_shape(about)] = min(best.get(_shape(about), (both, text)), (both, text))
    return [text for _, text in best.values()]
