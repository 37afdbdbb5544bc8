"""What is made of a GPU check's record: the page, the paragraph of another page, the table of measured back-ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.measure.gpu_check import decoding, part_times, report
from hf_imgproc_attn.measure.gpu_check.choices import (
    KINDS,
    MeasuredAlgorithms,
    MeasuredOrder,
    algorithm_choices,
    algorithms_source,
    cuda_choices,
)
from hf_imgproc_attn.measure.gpu_check.goals import GOALS, goal_lines
from hf_imgproc_attn.measure.gpu_check.rehearsal import read_rehearsal
from hf_imgproc_attn.models import backend_measured
from hf_imgproc_attn.models.backend_measured import SAFE, cuda_order
from tests.helpers import ROOT

Record = dict[str, Any]
SHAPE = (8, 12, 2048, 64)


def spread(ratio: float) -> Record:
    return {
        "milliseconds": 2 * ratio, "ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1, "rounds": 5,
        "plain_milliseconds": 2.0, "plain_tflops": 300.0, "tflops": 250.0, "peak_mib": 20.0, "plain_peak_mib": 10.0,
    }  # fmt: skip


def timed(name: str, backend: str, forward: float, both: float, status: str = "measured") -> tuple[str, Record]:
    about = {"filter": name, "backend": backend, "shape": list(SHAPE), "is_causal": True, "graph": False}
    values = {"directions": {"forward": spread(forward), "forward + backward": spread(both)}}
    return f"{name}, {backend}, causal {SHAPE}", {"about": about, "status": status, "values": values, "seconds": 1.0}


def part(cases: list[tuple[str, Record]], not_reached: list[str] | None = None) -> Record:
    entry = {"title": "t", "cases": dict(cases), "seconds": 61.0, "failure": None}
    return {**entry, "not_reached": [] if not_reached is None else not_reached}


def a_record() -> Record:
    """A little of everything that a GPU could say."""
    modes = {"float32": {"logits_multiple": 1.24, "gradients_multiple": 1.36}}
    model = {"about": {"what": "all modes", "backbone": "vit", "preset": "twicing"}, "status": "measured"}
    checked = {
        "method": "SDPA flash", "backend": "SDPA", "filter": "twicing", "shape": [1, 2, 515, 64], "is_causal": True,
        "dtype": "bfloat16",
    }  # fmt: skip
    step = {"what": "training step", "model": "ViT-B", "variant": "bilateral", "compiled": True}
    stepped = {**spread(1.2), "work": "64 images", "stock_milliseconds": 50.0}
    multiples = {"output": 1.0, "dQ": 2.3}
    filtered = {"about": {"what": "filtered model", "model": "Llama", "filter": "twicing"}}
    errors = {"float32": {"output_multiple": 1.11, "gradients_multiple": 1.92}}
    decoded = {"what": "decoding", "model": "Llama", "cache": "static"}
    verdicts = {"fgsm_same_as_cpu": 1.0, "pgd_same_as_cpu": 0.98}
    speed = {"train_images": 50000, "test_images": 10000, "epochs": 12, "parameters": {"softmax": 701000}}
    runs = [
        (f"softmax, seed {seed}", {
            "about": {"preset": "softmax", "seed": seed}, "status": "measured",
            "values": {"clean": accuracy, "noise 0.1": 0.5, "epochs": 12, "training_seconds": 9.0},
        })
        for seed, accuracy in enumerate((0.70, 0.74))
    ]  # fmt: skip
    return {
        "format": 1,
        "environment": {
            "device": {"type": "cuda", "name": "NVIDIA H100", "memory_gib": 79.1, "cuda": "13.0"},
            "versions": {"python": "3.12.3", "torch": "2.11.0+cu130", "transformers": "5.17.0", "triton": "3.6.0"},
            "git": None,
            "source_sha256": "0123456789abcdef",
        },
        "parts": {
            "a": part([("vit twicing", {**model, "values": modes, "seconds": 1.0})]),
            "b": part(
                [
                    ("one", {"about": checked, "status": "measured", "values": {"multiples": multiples}}),
                    ("two", {"about": checked, "status": "crashed", "reason": "exit status 3\nand more"}),
                    ("three", {"about": checked, "status": "refused", "reason": "No available kernel | none"}),
                ],
                ["four", "five"],
            ),
            "f": part(
                [
                    ("Llama twicing", {**filtered, "status": "measured", "values": errors}),
                    ("decoding", {"about": decoded, "status": "measured", "values": {"float32": 1e-6}}),
                    ("attacks", {"about": {"what": "attacks"}, "status": "measured", "values": verdicts}),
                    ("lens", {"about": {"what": "measures of heads"}, "status": "measured", "values": {"a": 2e-5}}),
                ]
            ),
            "c": part(
                [
                    timed("twicing", "sdpa", 2.0, 2.1),
                    timed("twicing", "triton", 1.5, 2.2),
                    timed("twicing", "flex", 1.4, 1.5),
                    ("choice", {"about": {"what": "choice"}, "status": "measured", "values": {"a shape": "flash"}}),
                    ("kernels", {"about": {"what": "kernels"}, "status": "measured", "values": {"a shape": ["fa3"]}}),
                ]
            ),
            "d": part([("step", {"about": step, "status": "measured", "values": stepped})]),
            "e": part([("speed", {"about": {}, "status": "measured", "values": speed}), *runs]),
        },
    }  # fmt: skip


def test_a_rehearsal_stands_on_the_page_until_a_gpu_was_measured() -> None:
    rehearsed = a_record()
    rehearsed["parts"].pop("e")
    lines = report.page(None, rehearsed).splitlines()
    assert any(line.startswith("| Back-ends against float64") and line.count(" 1 |") == 3 for line in lines)
    assert next(line for line in lines if line.startswith("| Back-ends")).rstrip(" |").endswith("2")
    assert next(line for line in lines if line.startswith("| A small training")).rstrip(" |").endswith("all")
    assert "has not yet run on a GPU" in " ".join(lines)
    assert report.page(a_record(), rehearsed) == report.page(a_record())


def test_the_committed_rehearsal_ran_to_its_end() -> None:
    record = read_rehearsal(ROOT)
    assert record is not None
    assert record["environment"]["device"]["type"] == "cpu"
    assert report.is_complete(record)


def test_committed_pages_are_what_the_committed_record_says() -> None:
    path = ROOT / "docs" / "gpu.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    assert (ROOT / report.PAGE).read_text(encoding="utf-8") == report.page(record, read_rehearsal(ROOT))
    compatibility = (ROOT / report.COMPATIBILITY).read_text(encoding="utf-8")
    assert report.paragraph(record).join(report.PARAGRAPH_MARKS) in compatibility
    table = (ROOT / report.TABLE).read_text(encoding="utf-8")
    assert report.table_source(record).join(report.TABLE_MARKS) in table
    algorithms = (ROOT / report.ALGORITHMS).read_text(encoding="utf-8")
    assert algorithms_source(record).join(report.TABLE_MARKS) in algorithms


def test_without_a_record_everything_says_not_measured() -> None:
    assert "Not measured" in report.page(None)
    assert "not measured" in report.paragraph(None)
    assert cuda_choices(None) == ()


def test_page_shows_what_was_measured_and_what_went_wrong() -> None:
    page = report.page(a_record())
    for line in (
        "NVIDIA H100, python 3.12.3, torch 2.11.0+cu130, transformers 5.17.0, triton 3.6.0, CUDA 13.0, 79.1 GiB; "
        "no git there, SHA-256 of the package's files 0123456789ab.",
        "| `twicing` | vit | 1.2 / 1.4 |",
        "1 measured, 1 refused, 1 crashed, 2 not reached, in 61 s.",
        "| SDPA flash | twicing | causal (1, 2, 515, 64) | bfloat16 | 2.3 |",
        "- three: No available kernel \\| none",
        "- two: **crashed**. exit status 3",
        "| Llama | twicing | 1.1 / 1.9 |",
        "Decoding as without a cache: Llama, static.",
        "Verdicts of FGSM and PGD that are those of the CPU: 98 %.",
        "Largest relative error of the lens's measures of heads: 2.0e-05.",
        "| twicing | triton | causal (8, 12, 2048, 64) | 1.50 (1.40 to 1.60) | 2.20 (2.10 to 2.30) | 3 / 4.4 "
        "| 250 / 250 | 300 / 300 | 20 / 10 |",
        "Plain SDPA chose: flash at a shape.",
        "- a shape: fa3",
        "| ViT-B | training step | 64 images | bilateral | compiled | 1.20 (1.10 to 1.30) | 2.4 / 50 |",
        "| `softmax` | 701,000 | 2 | 72.0 (70.0 to 74.0) | 50.0 (50.0 to 50.0) |",
    ):
        assert line in page.splitlines(), line


def test_paragraph_counts_and_names_the_fastest() -> None:
    text = report.paragraph(a_record())
    assert "On a GPU (NVIDIA H100, torch 2.11.0+cu130): of 16 checks 15 came out as they should and 1 did not" in text
    assert "1.40 / 1.50 by `flex` at causal (8, 12, 2048, 64)." in text


def test_a_part_that_was_not_run_says_so() -> None:
    record = a_record()
    del record["parts"]["d"]
    record["parts"]["e"] = part([("speed", {"about": {}, "status": "refused", "reason": "no data: none"})])
    page = report.page(record)
    assert "## Training steps and decoding\n\nNot measured.\n" in page
    assert "Not measured: no data: none" in page
    assert not report.is_complete(record)


def test_render_writes_a_checkout(tmp_path: Path) -> None:
    for name in (report.PAGE, report.COMPATIBILITY, report.TABLE, report.ALGORITHMS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    found = tmp_path / "gpu.json"
    found.write_text(json.dumps(a_record()), encoding="utf-8")
    report.render(found, tmp_path)
    assert (tmp_path / report.PAGE).read_text(encoding="utf-8") == report.page(a_record())
    assert "NVIDIA H100" in (tmp_path / report.COMPATIBILITY).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec((tmp_path / report.TABLE).read_text(encoding="utf-8"), namespace)  # the generated file is Python
    assert namespace["MEASURED"] == tuple(tuple(row) for row in cuda_choices(a_record()))
    report.render(tmp_path / "missing.json", tmp_path)  # and back
    assert "On a GPU: not measured." in (tmp_path / report.COMPATIBILITY).read_text(encoding="utf-8")
    assert "MEASURED: tuple[Row, ...] = ()\n" in (tmp_path / report.TABLE).read_text(encoding="utf-8")

    (tmp_path / report.COMPATIBILITY).write_text("no marks", encoding="utf-8")
    with pytest.raises(UsageError, match="compatibility.md must have the marks"):
        report.render(found, tmp_path)
    record = a_record()
    record["environment"]["device"]["type"] = "cpu"
    found.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match="of a rehearsal on the CPU"):
        report.render(found, tmp_path)


def test_orders_are_by_measured_time() -> None:
    """FlexAttention, which compiles at every shape, has to be a quarter faster; 1.4 is not, beside 1.5."""
    assert cuda_choices(a_record()) == (
        MeasuredOrder("twicing", True, False, 2048, 64, ("triton", "flex", "sdpa")),
        MeasuredOrder("twicing", True, True, 2048, 64, ("flex", "sdpa", "triton")),
    )


@pytest.mark.parametrize("letter", ["b", "c"])
@pytest.mark.parametrize("status", ["wrong", "failed", "crashed", "too slow"])
def test_a_back_end_that_went_wrong_is_in_no_order(letter: str, status: str) -> None:
    record = a_record()
    name, case = timed("twicing", "triton", 1.0, 1.0, status)
    record["parts"][letter]["cases"][f"again {name}"] = {"about": case["about"], "status": status}
    assert [row.order for row in cuda_choices(record)] == [("flex", "sdpa"), ("flex", "sdpa")]


def test_what_was_timed_on_some_filters_of_a_kind_only_is_not_compared() -> None:
    record = a_record()
    record["parts"]["c"] = part(
        [
            timed("bilateral untied", "sdpa", 2.0, 2.0),
            timed("bilateral gaussian", "sdpa", 1.2, 1.2),
            timed("bilateral untied", "blocked", 1.5, 3.0),
            timed("bilateral gaussian", "blocked", 1.4, 3.0),
            timed("bilateral gaussian", "flex", 0.1, 0.1),
        ]
    )
    assert [(row.kind, row.backward, row.order) for row in cuda_choices(record)] == [
        ("columns", False, ("blocked", "sdpa")),
        ("columns", True, ("sdpa", "blocked")),
    ]


def test_algorithms_are_ordered_by_their_own_time_in_each_direction() -> None:
    """Forward 3 ms against 2; forward + backward 4.4 and 4: 1.4 for the gradients against 2."""
    record = a_record()
    record["parts"]["c"] = part(
        [
            timed("twicing", "triton general", 1.5, 2.2),
            timed("twicing", "triton wavefront", 1.0, 2.0),
            timed("twicing", "triton", 0.1, 0.1),
            timed("twicing, 3 steps", "triton single_pass", 0.1, 0.1),
        ]
    )
    assert algorithm_choices(record) == (
        MeasuredAlgorithms("NVIDIA H100", True, False, 96, 2048, 64, ("wavefront", "general")),
        MeasuredAlgorithms("NVIDIA H100", True, True, 96, 2048, 64, ("general", "wavefront")),
    )
    assert '("NVIDIA H100", True, True, 96, 2048, 64, ("general", "wavefront")),' in algorithms_source(record)
    name, case = timed("twicing", "triton wavefront", 1.0, 1.0, "wrong")
    record["parts"]["b"]["cases"][name] = {"about": case["about"], "status": "wrong"}
    assert algorithm_choices(record) == ()  # one is nothing to compare with
    assert algorithm_choices(None) == ()


def test_goals_say_what_was_reached_and_by_what() -> None:
    record = a_record()
    about = {"what": "decoding", "filter": "twicing, one token", "backend": "triton decode", "graph": True}
    about |= {"shape": [1, 12, 4096, 64], "is_causal": True}
    values = {"milliseconds": 0.01, "plain_milliseconds": 0.007, "ratio": 1.45, "ratio_low": 1.4, "ratio_high": 1.5}
    record["parts"]["c"]["cases"]["token"] = {"about": about, "status": "measured", "values": values}
    assert goal_lines(record) == [
        "twicing, ViT-B's shape, forward: goal 1.15, not measured",
        "twicing, ViT-B's shape, forward + backward: goal 1.30, not measured",
        "twicing, causal, 2,048 tokens, width 64, forward: goal 1.30, missed: 1.40 by flex",
        "twicing, causal, 2,048 tokens, width 64, forward + backward: goal 1.40, missed: 1.50 by flex",
        "twicing, one token after 4,096: goal 1.50, met: 1.45 by triton decode",
        "twicing in GPT-2 small, one token after 4,096: goal 1.10, not measured",
    ]
    assert "twicing, one token after 4,096: goal 1.50, met: 1.45 by triton decode" in report.summary(record)
    row = "| triton decode | (1, 12, 4096, 64) | CUDA graph | 1.45 (1.40 to 1.50) | 10 / 7 |"
    assert row in report.page(record).splitlines()


def test_goals_are_of_shapes_that_are_timed() -> None:
    timed_at = {shape.size for shape in (*part_times.SHAPES, *decoding.SHAPES)}
    assert {tuple(goal.about["shape"]) for goal in GOALS if "shape" in goal.about} <= timed_at


def test_a_rehearsal_and_a_single_back_end_give_no_rows() -> None:
    record = a_record()
    record["environment"]["device"]["type"] = "cpu"
    assert cuda_choices(record) == ()
    record = a_record()
    record["parts"]["c"] = part([timed("twicing", "sdpa", 2.0, 2.0)])
    assert cuda_choices(record) == ()


def test_nearest_measured_shape_decides_and_the_safe_order_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        ("twicing", True, False, 2048, 64, ("triton", "sdpa")),
        ("twicing", True, False, 16384, 64, ("blocked", "triton")),
        ("twicing", True, False, 2048, 128, ("sdpa", "triton")),
    )
    monkeypatch.setattr(backend_measured, "MEASURED", rows)

    def order(length: int, head_dim: int = 64, kind: str = "twicing", **other: bool) -> tuple[str, ...]:
        return cuda_order(kind, **{"is_causal": True, "backward": False, **other}, length=length, head_dim=head_dim)

    assert order(2048) == ("triton", "sdpa", "blocked", "reference")
    assert order(3000) == ("triton", "sdpa", "blocked", "reference")
    assert order(9000) == ("blocked", "triton", "sdpa", "reference")
    assert order(2048, 128) == ("sdpa", "triton", "blocked", "reference")
    for unlike in (order(500), order(2**17), order(2048, 16), order(2048, kind="columns")):
        assert unlike == SAFE
    assert order(2048, backward=True) == order(2048, is_causal=False) == SAFE


def test_kinds_are_those_of_the_flat_room() -> None:
    assert set(KINDS.values()) == set(backend_measured.KINDS)
