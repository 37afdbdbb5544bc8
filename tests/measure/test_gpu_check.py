"""``gpu-check``: the rehearsal of everything, and what a run does when cases fail, crash, hang or are killed."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.backbones import GPT2, VIT
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.measure.gpu_check import (
    child,
    part_any_model,
    part_training,
    report,
    rivals,
    runner,
    tensors,
)
from hf_imgproc_attn.measure.gpu_check.parts import PARTS, Part
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.helpers import ROOT, RunPython, interpreter_that_knows, run_command, started

# One worker runs the rehearsal for the four tests that look at it.
rehearsed = pytest.mark.xdist_group("gpu rehearsal")
quick = pytest.mark.usefixtures("prepared_workers")
FAULTY = (Part("x", "What goes wrong", "tests.measure.faulty_cases", share=1.0),)
Record = dict[str, Any]
# Not on a GPU machine. What hides them is read by every Python that has its folder on its path.
HIDDEN = ("datasets", "evaluate", "art", "sklearn", "matplotlib", "skimage", "cv2", "pandas")
KNOWN = (
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
    "tests.gpu.quick_interpreter",
)
"""The rehearsal's processes are forked from one that has imported it in their environment, the rest hidden."""
HIDE = f"""
import importlib.machinery, sys
HIDDEN = {HIDDEN!r}

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        found = super().find_distributions(context)
        return (each for each in found if (each.metadata["Name"] or "").lower() not in HIDDEN + ("scikit-learn",))

sys.meta_path[:] = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {str(ROOT)!r})
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Record:
    """The whole command on the CPU, as on a bare machine: not installed, and without what only training needs."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    words = "-m hf_imgproc_attn.cli gpu-check --device cpu --minutes 30 --strict --output deep/gpu.json --data"
    environment = {**child._environment("cpu", 1), "PYTHONPATH": str(folder)}
    with interpreter_that_knows(KNOWN, environment) as python:
        result = run_command([python, *words.split(), str(images)], cwd=folder, env=environment, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("written to deep/gpu.json")
    record: Record = json.loads((folder / "deep" / "gpu.json").read_text(encoding="utf-8"))
    return record


@pytest.fixture
def prepared_workers(prepared_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a real worker needs a real interpreter: Triton's kernels would be others."""
    monkeypatch.setattr(child, "_environment", lambda device, workers: {**os.environ, "PYTHONPATH": str(ROOT)})


def cases_of(record: Record, letter: str, **about: Any) -> dict[str, Record]:
    cases = record["parts"][letter]["cases"].items()
    return {name: case for name, case in cases if all(case["about"].get(key) == value for key, value in about.items())}


def statuses(record: Record, letter: str = "x") -> dict[str, str]:
    return {name: case["status"] for name, case in record["parts"][letter]["cases"].items()}


@rehearsed
def test_rehearsal_runs_every_part_to_its_end(rehearsal: Record) -> None:
    assert set(rehearsal["parts"]) == {part.letter for part in PARTS}
    for part in rehearsal["parts"].values():
        assert part["not_reached"] == []
        assert part["failure"] is None
        assert {case["status"] for case in part["cases"].values()} <= {"measured", "refused"}
    assert rehearsal["environment"]["versions"]["datasets"] is None, "the packages were not hidden"
    assert rehearsal["environment"]["device"]["type"] == "cpu"
    assert str(ROOT) not in json.dumps(rehearsal)


@rehearsed
def test_rehearsal_covers_every_preset_in_every_precision(rehearsal: Record) -> None:
    compared = cases_of(rehearsal, "a", what="all modes").values()
    found = {(case["about"]["preset"], case["about"]["backbone"]) for case in compared}
    assert found == {
        (preset, backbone.name)
        for preset in PRESETS
        for backbone in (GPT2, VIT)
        if preset not in backbone.refused_presets
    }
    for case in compared:
        assert case["values"].keys() == {"float32", "bfloat16", "float16", "autocast bfloat16"}
        assert 0 < case["values"]["float32"]["logits"] < 1e-5 < case["values"]["bfloat16"]["logits"] < 0.05
    generated = {case["about"]["preset"] for case in cases_of(rehearsal, "a", what="generation").values()}
    assert generated == set(PRESETS) - set(GPT2.refused_presets)
    for what in ("training", "gradient checkpointing", "torch.compile"):
        assert cases_of(rehearsal, "a", what=what)


@rehearsed
def test_rehearsal_covers_every_back_end(rehearsal: Record) -> None:
    measured = [case for case in cases_of(rehearsal, "b").values() if case["status"] == "measured"]
    methods = {case["about"]["method"] for case in measured}
    # The memory-efficient and cuDNN kernels of SDPA are a GPU's.
    assert methods == {
        "triton single_pass", "triton general", "triton short", "triton wavefront", "triton decode",
        "triton composed", "triton in chunks", "triton with dropout", "triton",
        "SDPA flash", "SDPA maths", "sdpa", "blocked", "flex",
        "flex, called directly", "flex, several lengths",
    }  # fmt: skip
    decoded = [case for case in measured if case["about"]["method"] == "triton decode"]
    assert {case["about"]["dtype"] for case in decoded} == {"bfloat16", "float16"}
    assert max(case["values"]["multiples"]["output"] for case in decoded) <= 5.0
    measured = [case for case in measured if case not in decoded]
    with_parameter = {f"twicing, {name}" for name in ("sink", "forget")}
    assert {case["about"]["filter"] for case in measured} == {
        *tensors.FILTERS, *(f"twicing, {name}" for name in rivals.RIVALS)
    }  # fmt: skip
    for case in measured:
        parts = {"output"} if case["about"]["backend"].startswith("flex") else {"output", "dQ", "dK", "dV"}
        name = case["about"]["filter"]
        if ("by place" in name or name in with_parameter) and len(parts) > 1:
            parts.add("dt")
        assert case["values"]["multiples"].keys() == parts
        # The sum that a parameter's gradient is may be small.
        assert max(multiple for part, multiple in case["values"]["multiples"].items() if part != "dt") <= 5.0, case


@rehearsed
def test_rehearsal_covers_other_models(rehearsal: Record) -> None:
    cases = cases_of(rehearsal, "f")
    assert {case["status"] for case in cases.values()} == {"measured"}
    found = {(case["about"]["model"], case["about"]["filter"]) for case in cases.values()}
    assert {model for model, _ in found} == {*part_any_model.MODELS, "ViT"}
    assert {name for _, name in found} == set(part_any_model.FILTERS)
    assert {case["about"]["cache"] for case in cases_of(rehearsal, "f", what="decoding").values()} == {
        "dynamic", "static"
    }  # fmt: skip


@rehearsed
def test_rehearsal_times_filters_steps_and_training(rehearsal: Record) -> None:
    timed = [case for case in cases_of(rehearsal, "c").values() if "directions" in case.get("values", {})]
    assert {case["about"]["backend"] for case in timed} >= {"sdpa", "blocked", "triton", "SDPA flash"}
    assert {case["about"]["backend"] for case in timed if case["about"]["filter"] == "delta"} == {"sdpa", "blocked"}
    for case in timed:
        for found in case["values"]["directions"].values():
            assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
            assert found["milliseconds"] > 0
            assert found["tflops"] > 0
    steps = cases_of(rehearsal, "d").values()
    assert {(case["about"]["model"], case["about"]["compiled"]) for case in steps} >= {
        ("GPT-2 small", True), ("GPT-2 small", False), ("ViT-B", False)
    }  # fmt: skip
    assert all(case["values"]["ratio"] > 0 for case in steps)
    trained = [case for case in cases_of(rehearsal, "e").values() if case["about"]]
    assert [case["about"]["preset"] for case in trained] == sorted(part_training.PRESETS)
    for case in trained:
        assert case["values"].keys() >= {"clean", "noise 0.1", "FGSM 1/255"}
        assert 0 <= case["values"]["clean"] <= 1


def calm(tmp_path: Path) -> Path:
    """A folder for the cases' data that leaves out those that end their process: starting another takes seconds."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "calm").touch()
    return data


def run_faulty(tmp_path: Path, **options: Any) -> Record:
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    options = {"output": tmp_path / "found.json", "device": "cpu", "minutes": 5.0, "data": data, **options}
    return runner.run(parts=FAULTY, **options)


@quick
def test_each_ending_is_recorded_and_stops_nothing_else(tmp_path: Path) -> None:
    record = run_faulty(tmp_path)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == record
    assert statuses(record) == {
        "good": "measured", "nan": "measured", "wrong": "wrong", "refused": "refused", "no kernel": "refused",
        "exception": "failed", "lost": "crashed", "killed": "crashed", "hangs": "too slow", "waits": "measured",
        "earlier": "measured", "last": "measured",
    }  # fmt: skip
    cases = record["parts"]["x"]["cases"]
    assert cases["good"]["about"] == {"kind": "fine"}
    assert cases["nan"]["values"] == {"values": ["nan", 0.12346, "inf"]}
    assert cases["wrong"]["values"] == {"error": 3.0}
    assert cases["exception"]["reason"] == "ValueError: what is in tests/measure/faulty_cases.py is broken"
    assert "in fail" in cases["exception"]["traceback"]
    assert str(ROOT) not in json.dumps(cases)
    assert cases["lost"]["traceback"]
    assert "SIGABRT" in cases["killed"]["reason"]
    assert cases["hangs"]["reason"] == "killed after 0 s; it had printed: compiling ...\n"
    # After four processes ended, the last one still knows what all of them measured.
    assert cases["earlier"]["values"]["known"] == ["good", "nan", "waits"]


@quick
def test_resume_keeps_verdicts_and_retry_runs_bad_cases_again(tmp_path: Path) -> None:
    calm(tmp_path)
    first = run_faulty(tmp_path)
    again = run_faulty(tmp_path, resume=True)
    assert again["parts"]["x"]["cases"] == first["parts"]["x"]["cases"]
    (tmp_path / "data" / "mended").touch()
    retried = run_faulty(tmp_path, retry=True)
    assert statuses(retried) == {**statuses(first), "exception": "measured"}
    assert retried["parts"]["x"]["cases"]["good"]["values"]["runs"] == 1
    with pytest.raises(UsageError, match=r"found\.json' has results of part x already; --resume goes on with them"):
        run_faulty(tmp_path)
    anew = run_faulty(tmp_path, force=True)
    assert anew["parts"]["x"]["cases"]["good"]["values"]["runs"] == 2


@quick
def test_killing_the_run_in_the_middle_of_a_part_loses_nothing(tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "found.json"
    data.mkdir()
    (data / "wait").touch()
    code = textwrap.dedent(f"""
        from pathlib import Path
        from hf_imgproc_attn.measure.gpu_check import runner
        from tests.measure.test_gpu_check import FAULTY
        runner.run(parts=FAULTY, output=Path({str(output)!r}), device="cpu", minutes=5.0, data=Path({str(data)!r}))
    """)
    command = [sys.executable, "-c", code]
    deadline = time.monotonic() + 240
    with started(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path) as process:
        while not (data / "waiting").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pid = int((data / "waiting").read_text(encoding="utf-8"))
        process.kill()
        process.wait()
        while _is_alive(pid):  # the worker ends with the runner, whatever it was doing
            assert time.monotonic() < deadline
            time.sleep(0.05)

    before = json.loads(output.read_text(encoding="utf-8"))
    assert list(statuses(before)) == sorted(
        ["good", "nan", "wrong", "refused", "no kernel", "exception", "lost", "killed", "hangs"]
    )
    assert "not reached in the time given, 0 s" in report.summary(before)
    (data / "wait").unlink()
    after = run_faulty(tmp_path, resume=True)
    assert after["parts"]["x"]["cases"].items() >= before["parts"]["x"]["cases"].items()
    assert statuses(after).keys() - statuses(before).keys() == {"waits", "earlier", "last"}
    assert after["parts"]["x"]["not_reached"] == []


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@quick
def test_what_the_time_does_not_reach_is_named_and_left_for_resume(tmp_path: Path) -> None:
    (calm(tmp_path) / "wait").touch()  # the case that waits uses up what is left
    started = time.monotonic()
    record = run_faulty(tmp_path, minutes=0.2)
    assert time.monotonic() - started < 40
    part = record["parts"]["x"]
    assert part["not_reached"] == ["waits", "earlier", "last"]
    (tmp_path / "data" / "wait").unlink()
    record = run_faulty(tmp_path, resume=True)
    assert record["parts"]["x"]["not_reached"] == []
    assert statuses(record)["last"] == "measured"


@quick
def test_a_part_that_cannot_start_does_not_stop_the_next(tmp_path: Path) -> None:
    parts = (Part("w", "Missing", "tests.measure.there_is_no_such_module", share=0.5), *FAULTY)
    record = runner.run(parts=parts, output=tmp_path / "found.json", device="cpu", data=calm(tmp_path))
    assert "there_is_no_such_module" in record["parts"]["w"]["failure"]
    assert record["parts"]["w"]["not_reached"] is None
    assert statuses(record)["last"] == "measured"


@quick
def test_a_part_run_alone_leaves_the_others_in_the_record(tmp_path: Path) -> None:
    parts = (*FAULTY, Part("y", "The same", FAULTY[0].module, share=1.0))
    options: dict[str, Any] = {"output": tmp_path / "found.json", "device": "cpu", "data": calm(tmp_path)}
    first = runner.run(parts=parts, letters=["y"], **options)
    second = runner.run(parts=parts, letters=["x"], **options)
    assert second["parts"]["y"] == first["parts"]["y"]
    assert statuses(second, "x") == statuses(second, "y")


@quick
def test_several_workers_share_a_part(tmp_path: Path) -> None:
    parts = (Part("x", "Shared", FAULTY[0].module, share=1.0, workers=2),)
    (tmp_path / "data").mkdir()
    record = runner.run(
        parts=parts, output=tmp_path / "found.json", device="cpu", minutes=5.0, data=tmp_path / "data", workers=2
    )
    assert len(statuses(record)) == 12
    assert statuses(record)["last"] == "measured"
    assert record["parts"]["x"]["cases"]["last"]["values"]["runs"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "--output must be new or a record of gpu-check"),
        ('{"rows": []}', "--output must be new or a record of gpu-check"),
        (
            '{"format": 1, "parts": {}, "environment": {"device": {"type": "cuda"}}}',
            "--output must be new or a record of device 'cpu'",
        ),
    ],
)
def test_an_output_that_holds_something_else_is_not_overwritten(tmp_path: Path, content: str, message: str) -> None:
    output = tmp_path / "found.json"
    output.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        run_faulty(tmp_path)
    assert output.read_text(encoding="utf-8") == content


@quick
def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    calm(tmp_path)
    run_faulty(tmp_path)
    output = tmp_path / "found.json"
    record = json.loads(output.read_text(encoding="utf-8"))
    record["environment"]["device"]["name"] = "another machine"
    output.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match="holds parts x of another machine with torch"):
        run_faulty(tmp_path, resume=True)
    assert json.loads(output.read_text(encoding="utf-8")) == record
    assert run_faulty(tmp_path, force=True)["environment"]["device"]["name"] != "another machine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "new.json"], "device must be there, got 'cuda', and torch sees no GPU"),
        (["--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["--device", "cpu", "--parts", "a,q"], "--parts must be among a,b,c,d,e,f, got 'q'"),
        (["--minutes", "-1"], "--minutes must be a number > 0, got -1.0"),
        (["--render", "--output", "here"], "--output must be a record of gpu-check, got 'here', which is not there"),
    ],
)
def test_mistakes_are_one_line(run_python: RunPython, tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = tmp_path / "work"
    (folder / "here").mkdir(parents=True)
    result = run_python("-m", "hf_imgproc_attn.cli", "gpu-check", *arguments, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["here"]
