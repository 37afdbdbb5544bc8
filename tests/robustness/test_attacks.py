"""Attacks do what they say, see the model exactly as it is used, and show where gradients are masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.backbones import VIT
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.robustness import ImageSettings, evaluate_robustness, unpack_bits
from hf_imgproc_attn.robustness.attacks import (
    check_gradients,
    fgsm,
    fgsm_withstood,
    frozen,
    input_gradient,
    margin,
    pgd_withstood,
    spsa_withstood,
)
from hf_imgproc_attn.robustness.boundary import fab_withstood, smallest_change
from hf_imgproc_attn.robustness.classifier import PixelClassifier
from hf_imgproc_attn.robustness.ensemble import PARTS, _art_attacks, auto_attack_withstood
from hf_imgproc_attn.robustness.scores import masking_signs
from tests.robustness.conftest import tiny_classifier

QUICK = {"autoattack_steps": 6, "autoattack_targets": 2, "square_queries": 15, "spsa_steps": 3, "spsa_samples": 8}


class Watched(torch.nn.Module):
    """A classifier that remembers the images it saw."""

    def __init__(self, inner: PixelClassifier) -> None:
        super().__init__()
        self.inner, self.classes, self.device, self.seen = inner, inner.classes, inner.device, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach().clone())
        return self.inner(images)


def test_fgsm_equals_the_signed_gradient_step(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    moved = images.clone().requires_grad_(True)
    cross_entropy(classifier(moved), labels, reduction="sum").backward()
    assert moved.grad is not None
    expected = (images + 0.05 * moved.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(classifier, images, labels, 0.05), expected)
    with torch.no_grad():
        right = classifier(expected).argmax(-1) == labels
    assert not right.all()
    assert torch.equal(fgsm_withstood(classifier, images, labels, 0.05, batch_size=10), right)
    classifier.zero_grad()


@pytest.mark.parametrize("preset", ["twicing", "sos"])
def test_attacks_see_the_boosters(preset: str, images: torch.Tensor) -> None:
    """The gradient that attacks follow is that of the boosted model, by finite differences in float64."""
    boosted = tiny_classifier(preset).double()
    pixels, label = images[:1].double(), torch.tensor([1])
    gradient, _ = input_gradient(boosted, pixels, label)
    along = gradient / gradient.norm()

    def loss(at: torch.Tensor) -> float:
        model = boosted.model
        logits = model(pixel_values=(at - boosted.mean) / boosted.std).logits
        return float(cross_entropy(logits, label))

    with torch.no_grad():
        slope = (loss(pixels + 1e-5 * along) - loss(pixels - 1e-5 * along)) / 2e-5
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-5)
    plain = tiny_classifier("softmax").double()
    plain.model.load_state_dict(boosted.model.state_dict())
    other, _ = input_gradient(plain, pixels, label)
    assert (gradient - other).norm() > 1e-6 * gradient.norm()  # far above rounding


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in VIT.refused_presets])
def test_every_preset_has_gradients_that_attacks_can_follow(preset: str, images: torch.Tensor) -> None:
    classifier = tiny_classifier(preset)
    labels = torch.arange(24) % 4
    with frozen(classifier):
        counts = check_gradients(classifier, images, labels, 24)
        gradient, _ = input_gradient(classifier, images, labels)
    assert counts == {"images": 24, "zero_cross_entropy": 0, "zero_margin": 0}
    whole, _ = input_gradient(classifier, images, labels)
    torch.testing.assert_close(gradient, whole)  # whether parameters ask for gradients too


def test_pgd_stays_in_the_ball_and_follows_the_gradient(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    epsilon = 8 / 255
    watched = Watched(classifier)
    standing = pgd_withstood(watched, images, labels, epsilon, 24, steps=3, restarts=1)  # type: ignore[arg-type]
    start, first, *_ = watched.seen
    uniform = (start - images)[(start > 0) & (start < 1)] / epsilon
    assert uniform.abs().max() <= 1 + 1e-5
    assert uniform.std().item() == pytest.approx(3**-0.5, rel=0.05)
    gradient, _ = input_gradient(classifier, start, labels)
    kept = classifier(start).argmax(-1) == labels
    expected = images + (start + 2.5 * epsilon / 3 * gradient.sign() - images).clamp(-epsilon, epsilon)
    torch.testing.assert_close(first, expected.clamp(0, 1)[kept])
    for seen in watched.seen:
        assert seen.min() >= 0
        assert seen.max() <= 1
    assert 0 < standing.float().mean() < 1


def test_pgd_does_not_depend_on_batches_and_more_of_it_is_stronger(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    found = {
        size: pgd_withstood(classifier, images, labels, 4 / 255, size, steps=4, restarts=2, seed=3) for size in (5, 24)
    }
    assert torch.equal(found[5], found[24])
    more = pgd_withstood(classifier, images, labels, 4 / 255, 24, steps=4, restarts=4, seed=3)
    assert not (more & ~found[24]).any()
    assert torch.equal(pgd_withstood(classifier, images, labels, 1.0, 24), torch.zeros(24, dtype=torch.bool))


def test_pgd_is_as_strong_as_the_one_of_a_library(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        classifier, loss=torch.nn.CrossEntropyLoss(), input_shape=(3, 8, 8), nb_classes=4, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    x, y = images.numpy(), labels.numpy()
    theirs = FastGradientMethod(estimator, eps=4 / 255).generate(x, y)
    np.testing.assert_allclose(fgsm(classifier, images, labels, 4 / 255), theirs, atol=1e-6)
    np.random.seed(0)
    options = {"eps": 4 / 255, "eps_step": 10 / 255 / 20, "max_iter": 20, "num_random_init": 1, "verbose": False}
    attacked = torch.from_numpy(ProjectedGradientDescentPyTorch(estimator, **options).generate(x, y))
    with torch.no_grad():
        their_accuracy = (classifier(attacked).argmax(-1) == labels).float().mean()
    ours = pgd_withstood(classifier, images, labels, 4 / 255, 24, steps=20, restarts=1).float().mean()
    assert ours <= their_accuracy + 1 / 24
    classifier.zero_grad()


def test_spsa_needs_no_gradients_and_fools(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    class WithoutGradients(Watched):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.detach())

    watched = WithoutGradients(classifier)
    options = {"steps": 5, "samples": 16, "seed": 2}
    standing = spsa_withstood(watched, images[:8], labels[:8], 16 / 255, 10, **options)  # type: ignore[arg-type]
    assert standing.float().mean() < 0.8
    again = spsa_withstood(classifier, images[:8], labels[:8], 16 / 255, 64, **options)
    assert torch.equal(standing, again)
    for seen in watched.seen:
        assert seen.min() >= 0
        assert seen.max() <= 1


def test_margin_is_of_the_best_other_class() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [-1.0, 5.0]


def test_smallest_change_is_that_of_a_linear_programme() -> None:
    """min t with |d| <= t, 0 <= x + d <= 1 and <w, x + d> + b = 0; beyond reach, all the way."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(0)
    points, slope = rng.uniform(size=(12, 7)), rng.normal(size=(12, 7))
    points[0, :3] = 1.0  # at a bound
    slope[1, 2] = 0.0
    offset = -(slope * rng.uniform(size=(12, 7))).sum(1)
    offset[2] = 100.0  # no point in [0, 1] is on that plane
    found = smallest_change(*(torch.from_numpy(part) for part in (points, slope, offset))).numpy()
    assert ((points + found >= -1e-12) & (points + found <= 1 + 1e-12)).all()
    np.testing.assert_allclose(points[2] + found[2], (slope[2] < 0).astype(float), atol=1e-12)
    for x, w, b, d in zip(*(np.delete(part, 2, 0) for part in (points, slope, offset, found)), strict=True):
        assert w @ (x + d) + b == pytest.approx(0, abs=1e-9)
        both = np.vstack([np.c_[np.eye(7), -np.ones(7)], np.c_[-np.eye(7), -np.ones(7)]])
        bounds = [*zip(-x, 1 - x, strict=True), (0, None)]
        best = linprog([0] * 7 + [1], both, np.zeros(14), [[*w, 0]], [-b - w @ x], bounds)
        assert np.abs(d).max() == pytest.approx(best.fun, abs=1e-9)


def test_fab_finds_the_distance_to_a_flat_boundary() -> None:
    """Of a linear classifier: the margin over the 1-norm of the slope, found just below and missed just above."""
    torch.manual_seed(0)

    class Linear(torch.nn.Module):
        classes, device = 2, torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images.flatten(1))

    model = Linear()
    images = 0.5 + 0.1 * torch.rand(8, 3, 2, 2)
    with torch.no_grad():
        model.layer.bias -= model(images).mean(0)  # the boundary runs between the images
        logits = model(images)
    labels, slope = logits.argmax(1), model.layer.weight[1] - model.layer.weight[0]
    distance = (logits[:, 1] - logits[:, 0]).abs() / slope.abs().sum().detach()
    for image, label, least in zip(images, labels, distance, strict=True):
        given = (model, image[None], label[None], 1 - label[None])
        assert fab_withstood(*given, 0.98 * float(least), 20).item()  # type: ignore[arg-type]
        assert not fab_withstood(*given, 1.1 * float(least), 20).item()  # type: ignore[arg-type]


def test_fab_fools_and_sees_what_scale_hides(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """With logits a thousand times as large the cross-entropy has no gradient, and FAB finds what it found before."""
    with torch.no_grad():
        targets = classifier(images).scatter(1, labels[:, None], -torch.inf).argmax(1)
    epsilon = 8 / 255
    found = fab_withstood(classifier, images, labels, targets, epsilon, 10)
    assert 0 < found.float().mean() < 1

    class Scaled(Watched):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1000 * super().forward(images)

    scaled = Scaled(classifier)
    again = fab_withstood(scaled, images, labels, targets, epsilon, 10)  # type: ignore[arg-type]
    assert (again != found).float().mean() < 0.1  # rounding
    for seen in scaled.seen:
        assert seen.min() >= 0
        assert seen.max() <= 1
    blind = pgd_withstood(scaled, images, labels, epsilon, 24, steps=10)  # type: ignore[arg-type]
    assert blind.float().mean() > found.float().mean()


@pytest.mark.parametrize("preset", ["softmax", "twicing", "bilateral_twicing"])
def test_auto_attack_is_never_weaker_than_pgd(preset: str, images: torch.Tensor) -> None:
    """For every model: PGD's failures are counted, and that they are is said beside what AutoAttack finds alone."""
    classifier = tiny_classifier(preset, seed=1)
    with torch.no_grad():
        labels = classifier(images).argmax(-1)
    settings = ImageSettings(attacks=("autoattack", "pgd", "fgsm"), epsilons=(2 / 255, 8 / 255), steps=10, **QUICK)
    report = evaluate_robustness(classifier.model, classifier.processor, images, labels, settings)
    by_name: dict[tuple[str, float], Any] = {}
    for result in report["results"][1:]:
        by_name[result["disturbance"], result["parameters"]["epsilon"]] = result
    for epsilon in settings.epsilons:
        bits = {
            name: unpack_bits(by_name[name, epsilon]["correct"], 24)
            for name in ("FGSM", "PGD", "AutoAttack", "worst case")
        }
        auto = by_name["AutoAttack", epsilon]
        assert auto["value"] <= by_name["PGD", epsilon]["value"]
        assert not (bits["AutoAttack"] & ~bits["PGD"]).any()
        assert auto["counted_with"] == ["PGD"]
        assert auto["alone"] >= auto["value"]
        assert auto["alone"] == pytest.approx(1 - sum(auto["fooled_by"].values()) / 24)
        assert tuple(auto["fooled_by"]) == PARTS
        assert torch.equal(bits["worst case"], bits["FGSM"] & bits["AutoAttack"])
    assert by_name["AutoAttack", 8 / 255]["alone"] < 1
    assert by_name["AutoAttack", 8 / 255]["value"] <= by_name["AutoAttack", 2 / 255]["value"]
    assert by_name["PGD", 1.0]["value"] == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8)])
@pytest.mark.parametrize("classes", [2, 4])
def test_auto_attack_with_two_classes_and_grey_images(shape: tuple[int, int, int], classes: int) -> None:
    classifier = tiny_classifier("twicing", classes)
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = classifier(images).argmax(-1)
    state = np.random.get_state()[1].copy()
    watched = Watched(classifier)
    settings = ImageSettings(**QUICK)
    standing, fooled = auto_attack_withstood(watched, images, labels, 8 / 255, settings)  # type: ignore[arg-type]
    assert tuple(fooled) == (PARTS if classes > 2 else ("APGD-CE", "FAB-T", "Square"))
    assert int(standing.sum()) == 6 - sum(fooled.values())
    assert (np.random.get_state()[1] == state).all()
    assert all(parameter.grad is None for parameter in classifier.parameters())
    again, _ = auto_attack_withstood(classifier, images, labels, 8 / 255, settings)
    assert torch.equal(standing, again)


def test_square_has_room_in_oblong_pictures() -> None:
    """Where ART alone has none: its first square would be as wide as the picture."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    class Sums(torch.nn.Module):
        classes, device = 3, torch.device("cpu")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2)), images[:, :, 0].mean((1, 2))], 1)

    model = Sums()
    images = torch.rand(4, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    options = {"loss": torch.nn.CrossEntropyLoss(), "input_shape": (3, 4, 9), "nb_classes": 3, "clip_values": (0, 1)}
    estimator = PyTorchClassifier(model, device_type="cpu", **options)
    with pytest.raises(ValueError, match="low >= high|high <= 0"):
        SquareAttack(estimator, eps=0.1, max_iter=5, verbose=False).generate(images.numpy(), labels.numpy())
    settings = ImageSettings(**QUICK)
    (moved,) = _art_attacks(model, images, 0.2, settings)["Square"](images.numpy(), labels.numpy())  # type: ignore[arg-type]
    change = np.abs(moved - images.numpy())
    assert 0 < change.max() <= 0.2 + 1e-6
    standing, fooled = auto_attack_withstood(model, images, labels, 0.5, settings)  # type: ignore[arg-type]
    assert standing.sum() == 0
    assert tuple(fooled) == PARTS  # also those that nothing was left for


class Broken(torch.nn.Module):
    """Wraps a classifier's model so that its logits have masked or broken gradients."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.inner, self.change, self.config = model, change, model.config
        self.device, self.dtype = model.device, model.dtype

    def forward(self, pixel_values: torch.Tensor) -> Any:
        output = self.inner(pixel_values=pixel_values)
        output.logits = self.change(output.logits, pixel_values)
        return output


def test_masked_gradients_are_counted_and_said(images: torch.Tensor) -> None:
    plain = tiny_classifier("softmax")
    with torch.no_grad():
        labels = plain(images).argmax(-1)
    settings = ImageSettings(attacks=("pgd", "spsa"), epsilons=(16 / 255,), steps=3, restarts=1, **QUICK)

    def signs(change: Any) -> tuple[dict[str, int], str]:
        model = Broken(plain.model, change)
        report = evaluate_robustness(model, plain.processor, images, labels, settings)  # type: ignore[arg-type]
        return report["gradients"], "; ".join(report["masking"])

    gradients, said = signs(lambda logits, pixels: logits)
    assert gradients == {"images": 24, "zero_cross_entropy": 0, "zero_margin": 0}
    assert "gradient of" not in said
    gradients, said = signs(lambda logits, pixels: (logits.detach() * 10).round() / 10 + 0 * pixels.sum())
    assert gradients["zero_margin"] == 24
    assert "for 24 of 24 images the gradient of the logits is zero in every pixel" in said
    assert "SPSA, an attack without gradients, fools more images than PGD does with ε = 16/255" in said
    assert "PGD without a bound (ε = 1) leaves" in said
    gradients, said = signs(lambda logits, pixels: logits * 1e4)  # a saturated softmax
    assert gradients["zero_cross_entropy"] > gradients["zero_margin"] == 0
    assert "the gradient of the cross-entropy is zero in every pixel" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(images: torch.Tensor, value: float) -> None:
    plain = tiny_classifier("softmax")
    broken = PixelClassifier(Broken(plain.model, lambda logits, pixels: logits * value), plain.processor)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"must have finite logits and gradients .*, got others for 24 of 24"):
        check_gradients(broken, images, torch.zeros(24, dtype=torch.long), 10)


def test_signs_of_masking_are_told_from_results() -> None:
    def result(name: str, epsilon: float, value: float, **more: Any) -> dict[str, Any]:
        return {"family": "attack", "disturbance": name, "parameters": {"epsilon": epsilon}, "value": value,
                "samples": 200, **more}  # fmt: skip

    gradients = {"images": 200, "zero_cross_entropy": 0, "zero_margin": 0}
    sound = [result("FGSM", 0.1, 0.5), result("PGD", 0.1, 0.3), result("PGD", 0.2, 0.1), result("PGD", 1.0, 0.0),
             result("AutoAttack", 0.1, 0.28, fooled_by={"APGD-CE": 150, "Square": 1})]  # fmt: skip
    assert masking_signs(sound, gradients) == []
    for changed, said in (
        (result("FGSM", 0.1, 0.28), "FGSM, one step, fools more images than PGD does with ε = 0.1"),
        (result("PGD", 0.2, 0.4), "accuracy under PGD grows with ε"),
        (result("PGD", 1.0, 0.05), r"PGD without a bound (ε = 1) leaves 5.0 % of the images right"),
        (
            result("AutoAttack", 0.1, 0.2, fooled_by={"Square": 9}),
            "Square, an attack without gradients, fools another 4.5 %",
        ),
    ):
        assert any(sign.startswith(said) for sign in masking_signs([*sound, changed], gradients))


def test_parameters_take_gradients_again_after_an_attack(classifier: PixelClassifier) -> None:
    first = next(classifier.parameters())
    first.requires_grad_(False)
    with frozen(classifier):
        assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert [parameter.requires_grad for parameter in classifier.parameters()].count(False) == 1
    first.requires_grad_(True)
