"""``gpu-check``: the rehearsal of everything, and what a run does when cases fail, crash, hang or are killed."""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.measure.benchmark.attention import Shape
from hf_imgproc_attn.measure.gpu_check import (
    cifar,
    part_backends,
    part_models,
    part_steps,
    part_times,
    part_training,
    report,
    runner,
    tensors,
    worker,
)
from hf_imgproc_attn.measure.gpu_check.parts import PARTS, Bench, Part, Refused
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.helpers import ROOT, RunPython, run_command, started

# One worker runs the rehearsal for the four tests that look at it.
rehearsed = pytest.mark.xdist_group("gpu rehearsal")
FAULTY = (Part("x", "What goes wrong", "tests.measure.faulty_cases", share=1.0),)
Record = dict[str, Any]

# Not on a GPU machine. What hides them is read by every Python that has its folder on its path.
HIDDEN = ("datasets", "evaluate", "foolbox", "sklearn", "matplotlib", "skimage", "cv2", "pandas")
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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set like CIFAR-10, of a few images of noise."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 20)):
        encoded = []
        for _ in range(count):
            stream = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
            encoded.append({"bytes": stream.getvalue(), "path": None})
        table = pyarrow.table({"img": encoded, "label": [index % 10 for index in range(count)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Record:
    """The whole command on the CPU, as on a bare machine: not installed, and without what only training needs."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    result = run_command(
        [
            *(sys.executable, "-m", "hf_imgproc_attn.cli", "gpu-check", "--device", "cpu", "--minutes", "30"),
            *("--strict", "--data", str(images), "--output", "deep/gpu.json"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("written to deep/gpu.json")
    record: Record = json.loads((folder / "deep" / "gpu.json").read_text(encoding="utf-8"))
    return record


def cases_of(record: Record, letter: str, **about: Any) -> dict[str, Record]:
    cases = record["parts"][letter]["cases"].items()
    return {name: case for name, case in cases if all(case["about"].get(key) == value for key, value in about.items())}


def statuses(record: Record, letter: str = "x") -> dict[str, str]:
    return {name: case["status"] for name, case in record["parts"][letter]["cases"].items()}


@rehearsed
def test_rehearsal_runs_every_part_to_its_end(rehearsal: Record) -> None:
    assert list(rehearsal["parts"]) == [part.letter for part in PARTS]
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
    assert found == {(preset, backbone) for preset in PRESETS for backbone in ("gpt2", "vit")}
    for case in compared:
        assert case["values"].keys() == {"float32", "bfloat16", "float16", "autocast bfloat16"}
        assert 0 < case["values"]["float32"]["logits"] < 1e-5 < case["values"]["bfloat16"]["logits"] < 0.05
    assert {case["about"]["preset"] for case in cases_of(rehearsal, "a", what="generation").values()} == set(PRESETS)
    for what in ("training", "gradient checkpointing", "torch.compile"):
        assert cases_of(rehearsal, "a", what=what)


@rehearsed
def test_rehearsal_covers_every_back_end(rehearsal: Record) -> None:
    measured = [case for case in cases_of(rehearsal, "b").values() if case["status"] == "measured"]
    methods = {case["about"]["method"] for case in measured}
    # The memory-efficient and cuDNN kernels of SDPA are a GPU's.
    assert methods == {
        "triton single_pass", "triton general", "triton short", "SDPA flash", "SDPA maths", "sdpa", "blocked", "flex",
        "flex, called directly", "flex, several lengths",
    }  # fmt: skip
    assert {case["about"]["filter"] for case in measured} == set(tensors.FILTERS)
    for case in measured:
        parts = {"output"} if case["about"]["backend"].startswith("flex") else {"output", "dQ", "dK", "dV"}
        if "by place" in case["about"]["filter"] and len(parts) > 1:
            parts.add("dt")
        assert case["values"]["multiples"].keys() == parts
        # The sum that a parameter's gradient is may be small.
        assert max(multiple for part, multiple in case["values"]["multiples"].items() if part != "dt") <= 5.0, case


@rehearsed
def test_rehearsal_times_filters_steps_and_training(rehearsal: Record) -> None:
    timed = [case for case in cases_of(rehearsal, "c").values() if "directions" in case.get("values", {})]
    assert {case["about"]["backend"] for case in timed} >= {"sdpa", "blocked", "triton", "SDPA flash"}
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


def test_what_the_time_does_not_reach_is_named_and_left_for_resume(tmp_path: Path) -> None:
    (calm(tmp_path) / "wait").touch()  # the case that waits uses up what is left
    started = time.monotonic()
    record = run_faulty(tmp_path, minutes=0.5)
    assert time.monotonic() - started < 40
    part = record["parts"]["x"]
    assert part["not_reached"] == ["waits", "earlier", "last"]
    (tmp_path / "data" / "wait").unlink()
    record = run_faulty(tmp_path, resume=True)
    assert record["parts"]["x"]["not_reached"] == []
    assert statuses(record)["last"] == "measured"


def test_a_part_that_cannot_start_does_not_stop_the_next(tmp_path: Path) -> None:
    parts = (Part("w", "Missing", "tests.measure.there_is_no_such_module", share=0.5), *FAULTY)
    record = runner.run(parts=parts, output=tmp_path / "found.json", device="cpu", data=calm(tmp_path))
    assert "there_is_no_such_module" in record["parts"]["w"]["failure"]
    assert record["parts"]["w"]["not_reached"] is None
    assert statuses(record)["last"] == "measured"


def test_a_part_run_alone_leaves_the_others_in_the_record(tmp_path: Path) -> None:
    parts = (*FAULTY, Part("y", "The same", FAULTY[0].module, share=1.0))
    options: dict[str, Any] = {"output": tmp_path / "found.json", "device": "cpu", "data": calm(tmp_path)}
    first = runner.run(parts=parts, letters=["y"], **options)
    second = runner.run(parts=parts, letters=["x"], **options)
    assert second["parts"]["y"] == first["parts"]["y"]
    assert statuses(second, "x") == statuses(second, "y")


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
    assert run_faulty(tmp_path)["environment"]["device"]["name"] != "another machine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "new.json"], "device must be there, got 'cuda', and torch sees no GPU"),
        (["--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["--device", "cpu", "--parts", "a,q"], "--parts must be among a,b,c,d,e, got 'q'"),
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


@pytest.mark.parametrize("name", list(tensors.FILTERS))
def test_exact_results_are_the_package_s_reference(name: str) -> None:
    """The formulas of the check, and the dense back-end that everything else is tested against."""
    for shape in (Shape(2, 2, 11, 8), Shape(2, 2, 9, 8, is_causal=False)):
        inputs = tensors.draw(name, shape)
        wanted = tensors.exact(name, inputs)
        assert tensors.relative_error(tensors.attend(name, "reference")(inputs), wanted) < 1e-13
        plain = tensors.exact("plain", tensors.draw("plain", shape))
        assert (tensors.relative_error(plain, wanted) > 0.05) == (name != "plain")


@pytest.mark.parametrize("name", list(tensors.FILTERS))
def test_inputs_are_exact_in_half_precision_at_full_size(name: str) -> None:
    """One result in float64 is then the truth for every precision; 515^2 / 4 would overflow float16."""
    inputs = tensors.draw(name, part_backends.CAUSAL)
    terms = [inputs.query, inputs.value, *(inputs.features or ()), *([] if inputs.bias is None else [inputs.bias])]
    for term in terms:
        assert term.isfinite().all()
        assert torch.equal(term.bfloat16().double(), term)
        assert torch.equal(term.half().double(), term)


def test_cases_of_a_gpu_have_names_of_their_own() -> None:
    """The full list, which the rehearsal shortens."""
    for module, count in (
        (part_models, 60),
        (part_backends, 100),
        (part_times, 70),
        (part_steps, 20),
        (part_training, 21),
    ):
        names = [case.name for case in module.cases(Bench("cuda"))]
        assert len(set(names)) == len(names) >= count


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    setting = part_backends.Setting("twicing", part_backends.TINY_CAUSAL, "float32", "cpu")
    for factor in (float("nan"), 1.01):
        broken = tensors.attend("twicing", "sdpa")

        def run(inputs: tensors.Inputs, factor: float = factor, broken: tensors.Attend = broken) -> torch.Tensor:
            return broken(inputs) * factor

        with pytest.raises(part_backends.Wrong, match="times plain attention's error"):
            part_backends.compare(setting, run, True, 1.0)


def test_a_wrong_yardstick_is_wrong_and_passes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of the error of plain attention, or of the stock model, mean nothing where that is wrong itself."""
    setting = part_backends.Setting("twicing", part_backends.TINY_CAUSAL, "float32", "cpu")
    monkeypatch.setattr(part_backends, "plain_errors", lambda *setting: [1e-6, 1e-6, 1e-6, 1e-3])
    with pytest.raises(part_backends.Wrong, match="the yardstick, is off itself"):
        part_backends.compare(setting, tensors.attend("twicing", "sdpa"), True, 1.0)
    as_with_tf32 = {mode: {"logits": 1e-3, "gradients": 1e-3} for mode in part_models.MODES}
    monkeypatch.setattr(part_models, "stock_errors", lambda *stock: as_with_tf32)
    with pytest.raises(part_models.Wrong, match="float32: relative error of logits 0.001, allowed 2e-05"):
        part_models.compare(Bench("cpu"), "vit", "softmax", 1.0)


def test_what_compiles_for_long_is_timed_last() -> None:
    backends = [case.about.get("backend") for case in part_times.cases(Bench("cuda"))]
    first = backends.index("flex")
    assert set(backends[first:]) == {"flex"}
    assert {"triton single_pass", "triton general", "SDPA cuDNN"} <= set(backends[:first])


class FakeEvent:
    """A CUDA event by a clock that every call moves on."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_events_time_as_many_calls_as_make_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(milliseconds: float) -> None:
        FakeEvent.now += milliseconds

    for milliseconds, calls in ((0.5, 8), (100.0, 1), (0.001, 50)):
        this = lambda milliseconds=milliseconds: call(milliseconds)  # noqa: E731
        assert part_times.calls_in_a_sample(this) == calls
        assert part_times.event_clock({this: 3})(this) == pytest.approx(milliseconds / 1000)


def test_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, total_memory, multi_processor_count = 9, 0, 80 * 2**30, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = worker.environment("cuda")["device"]
    assert found["name"] == "a GPU"
    assert (found["compute_capability"], found["memory_gib"], found["multiprocessors"]) == ("9.0", 80.0, 132)


@pytest.mark.parametrize(
    ("seconds_left", "seconds_a_round", "wanted"),
    [
        (100.0, 1.0, (20, 5)),  # ten epochs for five seeds and more
        (25.0, 1.0, (12, 2)),
        (5.0, 1.0, (5, 1)),
        (0.5, 1.0, (1, 1)),
        (1e6, 1.0, (40, 5)),
    ],
)
def test_epochs_and_seeds_follow_from_the_time(
    seconds_left: float, seconds_a_round: float, wanted: tuple[int, int]
) -> None:
    assert part_training.plan(seconds_left, seconds_a_round) == wanted


def test_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [part_training.rate(step, 100) for step in range(100)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)]
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    """Every image is one of the 9 x 9 x 2 crops of itself."""
    pixels = torch.randint(1, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = part_training.augmented(pixels, torch.Generator().manual_seed(1))
    assert made.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels.float() / 255, (4, 4, 4, 4))
    mirrored = 0
    for image, source in zip(made, padded, strict=True):
        crops = [source[:, r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
        straight = any(torch.equal(image, crop) for crop in crops)
        mirrored += any(torch.equal(image, crop.flip(2)) for crop in crops)
        assert straight or any(torch.equal(image, crop.flip(2)) for crop in crops)
    assert 0 < mirrored < len(made)


def test_fgsm_moves_every_pixel_by_epsilon_and_raises_the_loss(images: Path) -> None:
    model = part_training.build(Bench("cpu"), "twicing", 0).eval()
    test = cifar.read(images)[1]
    pixels = test.pixels.float() / 255
    attacked = part_training.fgsm(model, pixels, test.labels, 1 / 255)
    assert float((attacked - pixels).abs().max()) == pytest.approx(1 / 255, rel=1e-4)
    assert attacked.min() >= 0
    assert attacked.max() <= 1

    @torch.no_grad()
    def loss(x: torch.Tensor) -> float:
        logits = model(pixel_values=part_training.normalised(x)).logits
        return float(torch.nn.functional.cross_entropy(logits, test.labels))

    assert loss(attacked) > loss(pixels)


def test_images_are_read_from_parquet(images: Path, tmp_path: Path) -> None:
    train, test = cifar.read(images)
    assert train.pixels.shape == (64, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8
    assert test.labels.tolist() == [index % 10 for index in range(20)]
    with pytest.raises(Refused, match="no data: --data must be a folder"):
        cifar.read(tmp_path / "missing")
    with pytest.raises(Refused, match="has no train-\\*.parquet"):
        cifar.read(tmp_path)
