"""The benchmark: what it times, what it refuses to time, and how times become ratios and tables."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.cli import main
from hf_imgproc_attn.measure.benchmark import SUITES, attention, axes, decoding, padded, run, whole_models
from hf_imgproc_attn.measure.benchmark.attention import Limits, Shape, run_attention, too_much
from hf_imgproc_attn.measure.benchmark.methods import FILTERS, METHODS, PLAIN, Method, disagreement, published_vision
from hf_imgproc_attn.measure.benchmark.report import goals_table, render, slopes
from hf_imgproc_attn.measure.benchmark.timing import Row, interleave
from hf_imgproc_attn.models.layer_parameters import PositionProjection
from tests.helpers import ROOT, RunPython

NO_LIMITS = Limits(seconds=100.0, mib=1000.0, budget=0.0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(text: str) -> None:
    """Progress that nobody reads."""


def test_quick_run_covers_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "new" / "benchmark.json"
    run(quick=True, threads=1, output=output)
    assert torch.get_num_threads() == threads
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["quick"] is True
    assert record["partial"] is False
    assert record["threads"] == 1
    rows = record["rows"]
    methods: dict[str, set[str]] = {
        suite: {row["method"] for row in rows if row["suite"] == suite} for suite in SUITES
    }
    assert methods == {
        "attention": set(METHODS),
        "axes": set(axes.VALUES),
        "padding": set(padded.ways(padded.QUICK[0])),
        "decode": {decoding.STOCK, *decoding.VARIANTS, decoding.FILTERED},
        "layers": {"stock", *PRESETS},
        "models": {whole_models.STOCK, *whole_models.VARIANTS},
    }
    for row in rows:
        if row["skipped"]:
            assert row["ratio"] is None
            assert row["method"] == "twicing, triton", "on the CPU only this has no kernel"
            continue
        assert row["milliseconds"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["rounds"] >= 3
        assert row["method"] not in (PLAIN, padded.NONE, "stock") or row["ratio"] == 1
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert all(name in out for name in (*METHODS, *PRESETS))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "twicing, triton"])
def test_methods_agree_with_their_filter(name: str, is_causal: bool) -> None:
    assert disagreement(name, 67, 16, is_causal, torch.float32, "cpu") is None


@pytest.mark.parametrize(("shape", "kept"), list(zip(padded.QUICK, ((21, 18), (8, 7)), strict=True)))
def test_padding_hides_what_its_name_says(shape: Shape, kept: tuple[int, int]) -> None:
    right = torch.arange(shape.length) < torch.tensor(kept).view(2, 1, 1, 1)
    causal = torch.ones(shape.length, shape.length, dtype=torch.bool).tril(0 if shape.is_causal else shape.length)
    for name, found in padded.ways(shape).items():
        seen = found()
        assert seen.mask is None, f"{name}: a layer should find out that this is no more than padding"
        keys = torch.ones_like(right) if name == padded.NONE else right.flip(-1) if name == "on the left" else right
        allowed = seen.allowed(torch.device("cpu"))
        expected = keys & causal
        if allowed is None:
            assert expected.all()
        else:
            assert torch.equal(allowed.expand_as(expected), expected)


@pytest.mark.parametrize("make", [decoding.attention_step, decoding.model_step])
def test_a_row_of_steps_projects_its_positions_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every timed call, not in the first alone: a cache that is cropped keeps what it knows of positions."""
    made: list[int] = []
    forward = PositionProjection.forward

    def counted(self: PositionProjection, states: torch.Tensor) -> torch.Tensor:
        made.append(states.shape[1])
        return forward(self, states)

    sizes = {**whole_models.GPT2_TINY, "n_layer": 1}
    options = {"steps": decoding.STEPS} if make is decoding.model_step else {}
    step = make(8, sizes, decoding.VARIANTS["bilateral"], "cpu", **options)
    monkeypatch.setattr(PositionProjection, "forward", counted)
    for _ in range(2):
        step()
    assert made == [decoding.STEPS] * 2


def test_ctrl_c_keeps_the_finished_rows_and_an_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = decoding.run_decoding(8, fields=whole_models.GPT2_TINY, device="cpu", budget=0.0, say=quiet)

    def some(*args: Any, **options: Any) -> Iterator[Row]:
        yield first
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "run_decoding", some)
    output = tmp_path / "costs.json"
    output.write_text("{}", encoding="utf-8")
    words = ["benchmark", "--suite", "decode", "--quick", "--threads", "1", "--output", str(output), "--force"]
    assert main(words) == 130
    assert output.read_text(encoding="utf-8") == "{}"
    record = json.loads((tmp_path / "costs.partial.json").read_text(encoding="utf-8"))
    assert record["partial"] is True
    assert [row["method"] for row in record["rows"]] == [first.method]
    assert first.case in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "costs.partial.json"]

    def nothing(*args: Any, **options: Any) -> Iterator[Row]:
        raise KeyboardInterrupt

    (tmp_path / "costs.partial.json").unlink()
    monkeypatch.setattr(decoding, "run_decoding", nothing)
    assert main(words) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_the_help_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    assert ", ".join(SUITES) in " ".join(capsys.readouterr().out.split())


def test_a_suite_that_is_run_again_goes_into_the_record_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = decoding.run_decoding(8, fields=whole_models.GPT2_TINY, device="cpu", budget=0.0, say=quiet)
    monkeypatch.setattr(decoding, "run_decoding", lambda *args, **options: iter([first]))
    output = tmp_path / "costs.json"
    words = ["benchmark", "--suite", "decode", "--quick", "--threads", "1", "--output", str(output), "--merge"]
    with pytest.raises(SystemExit):
        main(words)
    assert "merge needs a record of a benchmark at output" in capsys.readouterr().err
    others = [{**asdict(first), "suite": suite} for suite in ("attention", "decode", "models")]
    before = {
        "quick": True,
        "partial": False,
        "dtype": "float32",
        "threads": 1,
        "device": {"name": "old"},
        "versions": {"torch": "1"},
        "git": {"revision": "abc"},
        "seconds": 3.0,
        "rows": others,
    }
    output.write_text(json.dumps({**before, "threads": 2}), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(words)
    assert "merge needs a record with threads 1, got 2" in capsys.readouterr().err
    output.write_text(json.dumps(before), encoding="utf-8")
    for _ in range(2):  # what is kept says so again when it is kept once more
        assert main(words) == 0
        record = json.loads(output.read_text(encoding="utf-8"))
        assert [row["suite"] for row in record["rows"]] == ["attention", "decode", "models"]
        assert record["rows"][1] == json.loads(json.dumps(asdict(first)))
        assert record["versions"]["torch"] == torch.__version__
        assert [(kept["suites"], kept["git"]) for kept in record["kept"]] == [
            (["attention"], {"revision": "abc"}),
            (["models"], {"revision": "abc"}),
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_the_dense_filters_differ_from_each_other() -> None:
    """Else a method could pass for another."""
    inputs = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = [exact(inputs[0], inputs[1], inputs[2], True) for exact in FILTERS.values()]
    for first, second in itertools.combinations(outputs, 2):
        assert (first - second).abs().max() > 0.01


def nearly_twicing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
    return published_vision(q, k, v, is_causal) * (1 + 1e-3)


def failing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
    raise ValueError("no such kernel here")


@pytest.mark.parametrize(
    ("function", "reason"),
    [(nearly_twicing, "not timed: wrong output: relative error 0.001"), (failing, "not timed: no such kernel here")],
)
def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch, function: Any, reason: str) -> None:
    monkeypatch.setitem(METHODS, "broken", Method(function, "twicing", (4, 14)))
    shape = Shape(1, 2, 24, 8)
    rows = list(
        run_attention([shape], dtype=torch.float32, device="cpu", limits=NO_LIMITS, methods=["broken"], say=quiet)
    )
    broken = [row for row in rows if row.method == "broken"]
    assert len(broken) == 2
    for row in broken:
        assert row.ratio is None
        assert row.skipped is not None
        assert row.skipped.startswith(reason)
    assert reason in render([vars(row) for row in rows])


def test_what_is_too_large_is_skipped_and_named(one_thread: None) -> None:
    limits = Limits(seconds=100.0, mib=0.001, budget=0.0)
    names = ["twicing, two SDPA calls", "A kept whole (published, vision)"]
    rows = list(
        run_attention([Shape(1, 2, 64, 8)], dtype=torch.float32, device="cpu", limits=limits, methods=names, say=quiet)
    )
    skipped = {row.method for row in rows if row.skipped}
    assert skipped == {"A kept whole (published, vision)"}
    assert "MiB, above the limit of 0 MiB" in render([vars(row) for row in rows])


def test_estimates() -> None:
    """2A - A @ A at 16,384 tokens: 2 heads, four matrices forward; cubic work at a given rate."""
    shape, method = Shape(1, 2, 16384), METHODS["2A - A @ A (published, language)"]
    reason = too_much(method, shape, 0, None, 4, Limits(1e9, 8191.0, 0.0))
    assert reason == "skipped: about 8,192 MiB, above the limit of 8,191 MiB"
    assert too_much(method, shape, 0, None, 4, Limits(1e9, 8192.0, 0.0)) is None
    flops = 2 * 2 * 16384**2 * (4 * 64 + 16384)
    assert too_much(method, shape, 0, flops / 9.0, 4, Limits(10.0, 1e9, 0.0)) is None
    reason = too_much(method, shape, 0, flops / 11.0, 4, Limits(10.0, 1e9, 0.0))
    assert reason == "skipped: about 11 s a call, above the limit of 10 s"


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is twice as slow in a round is so for both candidates."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = [1.0, 1.0, 8.0, 2.0, 4.0, 1.0]
    calls = {"base": 0, "double": 0}

    def work(name: str, seconds: float) -> Any:
        def call() -> None:
            now[0] += seconds * pace[calls[name]]
            calls[name] += 1

        return call

    spreads = interleave({"base": work("base", 1.0), "double": work("double", 2.0)}, "base", budget=15.0)
    assert calls == {"base": 6, "double": 6}
    assert spreads["double"].rounds == 5
    assert (spreads["double"].ratio_low, spreads["double"].ratio, spreads["double"].ratio_high) == (2.0, 2.0, 2.0)
    assert spreads["base"].milliseconds == 2000.0


def test_peak_memory_sees_what_is_allocated_and_freed(run_python: RunPython) -> None:
    """In a process of its own: what others free meanwhile would be taken off."""
    code = (
        "import torch\n"
        "from hf_imgproc_attn.measure.benchmark.timing import peak_memory\n"
        "print(peak_memory(lambda: torch.ones(64 * 2**18).sum()))\n"
    )
    result = run_python("-c", code, fresh=True)
    assert result.returncode == 0, result.stderr
    # Only Linux tells the peak of a process.
    assert result.stdout == "None\n" if sys.platform != "linux" else 63 <= float(result.stdout) <= 80


def sweep_rows(exponent: float, method: str = "m", lengths: tuple[int, ...] = (64, 1024, 2048, 8192)) -> list[Any]:
    return [
        vars(
            Row(
                "attention",
                f"causal (1, 2, {length}, 64) float32",
                length,
                method,
                "forward",
                # Below 1,024 fixed costs would bend the line.
                milliseconds=length**exponent if length >= 1024 else 1e9,
                ratio=1.0,
                ratio_low=1.0,
                ratio_high=1.0,
            )
        )
        for length in lengths
    ]


def test_slopes() -> None:
    rows = sweep_rows(1.5) + sweep_rows(2.0, "other") + sweep_rows(2.0, "too few", (64, 1024))
    assert slopes(rows) == {
        ("causal", "m", "forward"): pytest.approx(1.5),
        ("causal", "other", "forward"): pytest.approx(2.0),
    }


def test_goals_table_tells_what_is_missing_and_what_is_missed() -> None:
    case, name = "causal (2, 12, 1024, 64) float32", "twicing, auto"
    values = {"ratio_low": 1.4, "ratio_high": 1.7}
    rows = [
        vars(Row("attention", case, 1024, name, "forward", ratio=1.5, **values)),
        vars(Row("attention", case, 1024, name, "forward + backward", ratio=1.76, **values)),
    ]
    lines = goals_table({"rows": rows}).splitlines()
    assert lines[2] == "| causal twicing, N = 1,024 | forward | 1.50 (1.40 to 1.70) | 1.50 | yes |"
    assert lines[3] == "| causal twicing, N = 1,024 | forward + backward | 1.76 (1.40 to 1.70) | 1.60 | no, +10% |"
    assert "not measured" in lines[4]


def test_cases_of_the_goals_exist() -> None:
    """The table of goals finds its rows by name: names that no suite makes would read `not measured` for ever."""
    from hf_imgproc_attn.measure.benchmark.report import GOALS

    made = {shape.name(torch.float32) for shape in (*attention.GOALS, *padded.SHAPES)}
    made |= {f"{case}, 1024 cached tokens" for case in ("attention alone", "whole model")}
    made.add("GPT-2, one text of 1024 tokens")
    known = {*METHODS, *padded.ways(padded.QUICK[0]), *decoding.VARIANTS, *whole_models.VARIANTS}
    assert {goal.case for goal in GOALS} <= made
    assert {goal.method for goal in GOALS} <= known


def test_the_page_holds_the_table_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    between = re.search(r"<!-- costs: begin -->\n(.*?)\n<!-- costs: end -->", page, re.DOTALL)
    assert between is not None, "the markers around the table of costs are missing"
    record = json.loads((ROOT / "docs" / "benchmark.json").read_text(encoding="utf-8"))
    assert not record["quick"]
    assert goals_table(record) in between[1]
