"""The parts of the GPU check: exact results, timing, learning rate, augmentation, attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn.measure.benchmark.attention import Shape
from hf_imgproc_attn.measure.gpu_check import (
    cifar,
    part_any_model,
    part_backends,
    part_models,
    part_steps,
    part_times,
    part_training,
    random_models,
    rivals,
    tensors,
    worker,
)
from hf_imgproc_attn.measure.gpu_check.parts import Bench, Refused


@pytest.mark.parametrize("name", list(tensors.FILTERS))
def test_exact_results_are_the_package_s_reference(name: str) -> None:
    """The formulas of the check, and the dense back-end that everything else is tested against."""
    for shape in (Shape(2, 2, 11, 8), Shape(2, 2, 9, 8, is_causal=False)):
        inputs = tensors.draw(name, shape)
        wanted = tensors.exact(name, inputs)
        assert tensors.relative_error(tensors.attend(name, "reference")(inputs), wanted) < 1e-13
        plain = tensors.exact("plain", tensors.draw("plain", shape))
        assert (tensors.relative_error(plain, wanted) > 0.05) == (name != "plain")


@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_exact_results_of_rivals_are_the_package_s_reference(rival: str) -> None:
    """Weights of other normalisations, gates that forget: output and all gradients."""
    inputs = rivals.drawn(rival, Shape(2, 2, 11, 8, is_causal=rival != "sinkhorn"))
    wanted = tensors.results(lambda given: rivals.exact(rival, given), inputs)
    got = tensors.results(lambda given: rivals.filtered(rival, "reference", given), inputs)
    assert len(got) == 4 + (rival in ("sink", "forget"))
    assert max(map(tensors.relative_error, got, wanted)) < 1e-12


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
        (part_any_model, 24),
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
    as_with_tf32 = {mode: {"logits": 1e-3, "gradients": 1e-3} for mode in random_models.MODES}
    monkeypatch.setattr(part_models, "stock_errors", lambda *stock: as_with_tf32)
    with pytest.raises(part_models.Wrong, match="float32: relative error of logits 0.001, allowed 2e-05"):
        part_models.compare(Bench("cpu"), "vit", "softmax", 1.0)


def test_a_filter_that_is_not_there_or_a_step_that_is_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filtered models differ from the model without a filter, and are compared with float64 at every step."""
    bench, sizes = Bench("cpu"), random_models.TINY
    inputs = part_any_model.given("Llama", sizes)
    plain = part_any_model.results(part_any_model.build("Llama", sizes, None), inputs, "float32")
    for name in part_any_model.FILTERS:
        found = part_any_model.results(part_any_model.build("Llama", sizes, name), inputs, "float32")
        assert tensors.relative_error(found[0], plain[0]) > 0.02, name
    build = part_any_model.build

    def off(title: str, sizes: random_models.Sizes, name: str | None) -> Any:
        """One model of float64, and another of the precision that is looked at."""
        off.calls += 1  # type: ignore[attr-defined]
        return build(title, sizes, None if off.calls % 2 else name)  # type: ignore[attr-defined]

    off.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(part_any_model, "build", off)
    with pytest.raises(part_models.Wrong, match="float32: relative error of the logits .*, allowed 2e-05"):
        part_any_model.decode(bench, "Llama", "dynamic", 1.0)


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
