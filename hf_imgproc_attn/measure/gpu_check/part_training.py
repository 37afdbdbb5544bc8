"""Part e: a small comparison: a ViT of about 0.7 million parameters learns CIFAR-10 with each of four filters.

The recipe is the same for all: patches of 4 x 4, AdamW (rate 1e-3, weight decay 0.05, a tenth of the steps to warm up,
cosine to 0), batches of 512 crops (4 pixels of padding) and mirror images, label smoothing 0.1, bfloat16. How many
epochs, and with how many seeds, follows from the speed that is measured first and the time that is left; every run has
the same epochs. Then accuracy on the test images: clean, under Gaussian noise, and under FGSM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import ImgProcViTConfig, ImgProcViTForImageClassification
from .cifar import Images, read
from .parts import Bench, Case, Refused

PRESETS = ("softmax", "twicing", "bilateral", "bilateral_twicing")
SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 384, "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TINY_SIZES = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEED = "speed"
MOST_SEEDS, MOST_EPOCHS, FEW_EPOCHS = 5, 40, 10
"""A further seed is worth more than epochs beyond FEW_EPOCHS."""
SIGMAS = (0.05, 0.1)
EPSILONS = (1 / 255, 2 / 255)
"""Noise and attack, in units of pixels from 0 to 1."""

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_TIMED_STEPS = 12
_KEPT = 0.85


def cases(bench: Bench) -> list[Case]:
    """The speed first, then seed by seed every preset."""
    found = [Case(SPEED, partial(measure_speed, bench), 120.0)]
    for seed in range(1 if bench.tiny else MOST_SEEDS):
        for preset in PRESETS:
            run = partial(train_and_evaluate, bench, preset, seed)
            found.append(Case(f"{preset}, seed {seed}", run, 400.0, {"preset": preset, "seed": seed}))
    return found


def batch_size(bench: Bench) -> int:
    """Images in a step."""
    return 32 if bench.tiny else 512


@cache
def _data(folder: Path | None, device: str) -> tuple[Images, Images]:
    """All images on the device, which has room for them."""
    train, test = read(folder)
    return tuple(Images(*(tensor.to(device) for tensor in images)) for images in (train, test))  # type: ignore[return-value]


def build(bench: Bench, preset: str, seed: int) -> Any:
    """A new model."""
    torch.manual_seed(seed)
    sizes = TINY_SIZES if bench.tiny else SIZES
    return ImgProcViTForImageClassification(ImgProcViTConfig.from_preset(preset, **sizes)).to(bench.device)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels from 0 to 1, normalised by the training images' channels."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels - mean) / std


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crops of images padded by 4 pixels, half of them mirrored: 8 bits in, 0 to 1 out."""
    batch, _, side, _ = pixels.shape
    device = pixels.device
    padded = nn.functional.pad(pixels.float() / 255, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, batch, 1), generator=generator, device=device)
    steps = torch.arange(side, device=device)
    columns = columns + steps
    mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(batch, device=device).view(-1, 1, 1)
    rows = (rows + steps).unsqueeze(2)
    # Indices on either side of the channels put them last.
    return padded[image, :, rows, columns.unsqueeze(1)].permute(0, 3, 1, 2)


def train(bench: Bench, preset: str, seed: int, steps: int) -> Iterator[Any]:
    """Train for so many steps; yields the model after every one."""
    images, _ = _data(bench.data, bench.device)
    model = build(bench, preset, seed).train()
    size = min(batch_size(bench), len(images.labels))
    named = list(model.named_parameters())
    decayed = [parameter for name, parameter in named if parameter.ndim >= 2 and "scalar_bias" not in name]
    others = [parameter for name, parameter in named if parameter.ndim < 2 or "scalar_bias" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=steps))
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    generator = torch.Generator(bench.device).manual_seed(seed)
    order = torch.empty(0, dtype=torch.long, device=bench.device)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(images.labels), generator=generator, device=bench.device)
        chosen, order = order[:size], order[size:]
        pixels = normalised(augmented(images.pixels[chosen], generator))
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            loss = loss_of(model(pixel_values=pixels).logits.float(), images.labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield model


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: a tenth of the steps upwards, then a cosine to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def measure_speed(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """Seconds of an epoch with each preset, and the epochs and seeds that the time left allows."""
    started = time.perf_counter()
    images, test = _data(bench.data, bench.device)
    steps_an_epoch = max(1, len(images.labels) // batch_size(bench))
    seconds = {}
    for preset in PRESETS:
        begun = 0.0
        timed = 2 if bench.tiny else _TIMED_STEPS
        for step, _ in enumerate(train(bench, preset, 0, 2 * timed)):
            if step == timed - 1:
                _wait(bench)
                begun = time.perf_counter()
        _wait(bench)
        seconds[preset] = (time.perf_counter() - begun) / timed * steps_an_epoch
    left = _KEPT * (seconds_left - (time.perf_counter() - started))
    epochs, seeds = plan(left, sum(seconds.values()))
    return {
        "train_images": len(images.labels),
        "test_images": len(test.labels),
        "seconds_an_epoch": seconds,
        "epochs": 1 if bench.tiny else epochs,
        "seeds": 1 if bench.tiny else seeds,
        "parameters": {preset: build(bench, preset, 0).num_parameters() for preset in PRESETS},
    }


def plan(seconds_left: float, seconds_a_round: float) -> tuple[int, int]:
    """Epochs of every run, and seeds: as many seeds as leave FEW_EPOCHS, then as many epochs as fit.

    Args:
        seconds_left: for everything.
        seconds_a_round: one epoch of every preset.
    """
    rounds = seconds_left / max(seconds_a_round, 1e-9)
    seeds = max(1, min(MOST_SEEDS, int(rounds // FEW_EPOCHS)))
    return max(1, min(MOST_EPOCHS, int(rounds / seeds))), seeds


def train_and_evaluate(bench: Bench, preset: str, seed: int, seconds_left: float) -> dict[str, Any]:
    """One run: training, then accuracy on clean, noisy and attacked test images."""
    speed = bench.earlier.get(SPEED)
    if speed is None:
        raise Refused("no speed was measured, see there")
    if seed >= speed["seeds"]:
        raise Refused(f"not planned: the time left allows {speed['seeds']} seeds")
    images, test = _data(bench.data, bench.device)
    steps = speed["epochs"] * max(1, len(images.labels) // batch_size(bench))
    started = time.perf_counter()
    model = None
    for model in train(bench, preset, seed, steps):  # noqa: B007
        pass
    _wait(bench)
    seconds = time.perf_counter() - started
    model = model.eval()  # type: ignore[union-attr]
    pixels = test.pixels.float() / 255
    values: dict[str, Any] = {
        "epochs": speed["epochs"],
        "training_seconds": seconds,
        "clean": accuracy(model, pixels, test.labels),
    }
    for sigma in SIGMAS:
        generator = torch.Generator(bench.device).manual_seed(0)
        noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
        values[f"noise {sigma:g}"] = accuracy(model, (pixels + sigma * noise).clamp(0, 1), test.labels)
    for epsilon in EPSILONS:
        attacked = fgsm(model, pixels, test.labels, epsilon)
        values[f"FGSM {round(epsilon * 255)}/255"] = accuracy(model, attacked, test.labels)
    return values


@torch.no_grad()
def accuracy(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Part of the images in [0, 1] that are classified correctly, in float32."""
    batches = zip(pixels.split(1000), labels.split(1000), strict=True)
    correct = sum((model(pixel_values=normalised(x)).logits.argmax(-1) == y).sum() for x, y in batches)
    return float(correct) / len(labels)


def fgsm(model: Any, pixels: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The fast gradient sign method (Goodfellow 2015): every pixel moves by epsilon to raise the loss, in [0, 1]."""
    attacked = []
    for x, y in zip(pixels.split(1000), labels.split(1000), strict=True):
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(pixel_values=normalised(x)).logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        attacked.append((x.detach() + epsilon * gradient.sign()).clamp(0, 1))
    return torch.cat(attacked)


def _wait(bench: Bench) -> None:
    if bench.device == "cuda":
        torch.cuda.synchronize()
