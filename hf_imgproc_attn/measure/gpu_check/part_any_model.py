"""Part f: filters in models of Transformers against float64, their decoding, and attacks and the lens on the device.

Stock classes with ``apply_filter``: errors as multiples of those that the same model has without a filter in the same
precision, decoding with dynamic and static caches against one pass without a cache.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from ...models.any_filter import apply_filter
from ..support_models import ARCHITECTURES, DECODERS, IMAGES
from .part_models import FLOORS, LARGEST_MULTIPLE, greedy
from .parts import Bench, Case, Wrong
from .random_models import FULL, MODES, TINY, Sizes, sharpened
from .tensors import relative_error

MODELS = ("Llama", "Mistral", "BERT", "DINOv2")
"""Grouped heads, sliding windows, both directions, images."""
FILTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "twicing": ("twicing", {}),
    "sos": ("sos", {}),
    "elliptical": ("elliptical", {}),
    "alibi, learned gain": ("alibi", {"boosting": "learned"}),
    "gaussian positions, twicing": ("softmax", {"position_kernel": "gaussian", "boosting": "twicing"}),
}
"""Title -> preset and fields of ``apply_filter``."""
CACHES = ("dynamic", "static")
_EPSILON = 8 / 255
_PGD_STEPS = 10
_MEASURES = ("entropy", "logit_std", "content_bandwidth", "distance", "sink_weight", "method_noise")


def cases(bench: Bench) -> list[Case]:
    """The cases, twicing first."""
    found = []
    for name in FILTERS:
        for title in MODELS:
            if "alibi" in name and title == "DINOv2":
                continue  # biases by the distance in a row of tokens are for texts
            about = {"what": "filtered model", "model": title, "filter": name}
            found.append(Case(f"{title} {name}", partial(compare, bench, title, name), 60.0, about))
    for title in (each for each in MODELS if each in DECODERS):
        for kind in CACHES:
            about = {"what": "decoding", "model": title, "filter": "twicing", "cache": kind}
            # A static cache is compiled on a GPU.
            found.append(Case(f"decoding {title} {kind}", partial(decode, bench, title, kind), 120.0, about))
    about = {"what": "attacks", "model": "ViT", "filter": "twicing"}
    found.append(Case("attacks", partial(attack, bench), 60.0, about))
    about = {"what": "measures of heads", "model": "ViT", "filter": "twicing"}
    found.append(Case("measures of heads", partial(look, bench), 60.0, about))
    return found


def fields_of(title: str, sizes: Sizes) -> dict[str, Any]:
    """Fields of the configuration of one of :data:`MODELS`."""
    fields = dict(ARCHITECTURES[title][1])
    fields |= {
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }
    if title in IMAGES:
        return fields | {"image_size": sizes.image, "patch_size": sizes.patch}
    if "head_dim" in fields:
        fields |= {"head_dim": sizes.width // sizes.heads, "num_key_value_heads": sizes.heads // 2}
    if "sliding_window" in fields:
        fields["sliding_window"] = sizes.length // 2
    return fields | {"vocab_size": sizes.vocabulary, "max_position_embeddings": sizes.length + sizes.new_tokens}


def build(title: str, sizes: Sizes, filter_name: str | None) -> Any:
    """A stock model in float32 on the CPU, for inference, its attention far from uniform, with a filter or without.

    Args:
        title: among :data:`MODELS`, or ``"ViT"``, which is a classifier.
        sizes: of the model.
        filter_name: key of :data:`FILTERS`, or None.
    """
    import transformers

    name = "ViTForImageClassification" if title == "ViT" else ARCHITECTURES[title][0]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = model_class.config_class(**fields_of(title, sizes))
    model: Any = sharpened(model_class(config).eval())
    if filter_name is not None:
        preset, fields = FILTERS[filter_name]
        apply_filter(model, preset, **fields)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "gain" in key:  # starts at 0, where there is no filter
                    parameter.fill_(0.7)
    return model


def given(title: str, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Two texts or two images."""
    generator = torch.Generator().manual_seed(2)
    if title in IMAGES:
        return {"pixel_values": torch.randn(2, 3, sizes.image, sizes.image, generator=generator)}
    return {"input_ids": torch.randint(3, sizes.vocabulary, (2, sizes.length), generator=generator)}


def results(model: Any, inputs: dict[str, torch.Tensor], mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and all gradients joined, in float64 on the CPU, of a fixed linear function of the output."""
    autocast = MODES[mode][1] if mode in MODES else None
    parameter = next(model.parameters())
    moved = {
        name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    with torch.autocast(parameter.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        found = model(**moved)
    output = found.logits if "logits" in found else found.last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)) / output.shape[-1] ** 0.5
    (output.double() * weights.to(output.device)).sum().backward()
    gradients = [each.grad for _, each in sorted(model.named_parameters()) if each.grad is not None]
    return output.detach().double().cpu(), torch.cat([each.double().cpu().flatten() for each in gradients])


def errors_in(bench: Bench, title: str, filter_name: str | None) -> dict[str, dict[str, float]]:
    """Relative errors of output and gradients in every mode."""
    sizes = TINY if bench.tiny else FULL
    inputs = given(title, sizes)
    truth = results(build(title, sizes, filter_name).double(), inputs, "float64")
    found = {}
    for mode, (dtype, _) in MODES.items():
        got = results(build(title, sizes, filter_name).to(bench.device, dtype), inputs, mode)
        errors = [relative_error(one, other) for one, other in zip(got, truth, strict=True)]
        found[mode] = {"output": errors[0], "gradients": errors[1]}
    return found


@cache
def plain_errors(device: str, title: str) -> dict[str, dict[str, float]]:
    """The yardstick: the same model without a filter, once a process."""
    return errors_in(Bench(device), title, None)


def compare(bench: Bench, title: str, filter_name: str, seconds_left: float) -> dict[str, Any]:
    """A filtered model in every mode against float64, and as multiples of the unfiltered model's errors."""
    plain = plain_errors(bench.device, title)
    values = {mode: dict(found) for mode, found in errors_in(bench, title, filter_name).items()}
    wrong = []
    for mode, found in values.items():
        for part in ("output", "gradients"):
            found[f"{part}_multiple"] = found[part] / plain[mode][part]
            allowed = max(LARGEST_MULTIPLE * plain[mode][part], FLOORS[mode])
            if not found[part] <= allowed:
                wrong.append(f"{mode}: relative error of {part} {found[part]:.2g}, allowed {allowed:.2g}")
    if wrong:
        raise Wrong("; ".join(wrong), values)
    return values


@torch.no_grad()
def decode(bench: Bench, title: str, kind: str, seconds_left: float) -> dict[str, Any]:
    """Greedy generation with a cache; the logits of every step against float64 without one."""
    sizes = TINY if bench.tiny else FULL
    prompt = given(title, sizes)["input_ids"]
    values, wrong = {}, []
    for mode in ("float32", "bfloat16"):
        model = build(title, sizes, "twicing").to(bench.device, MODES[mode][0])
        got, sequences = greedy(model, prompt, sizes, cache_implementation=kind)
        truth = build(title, sizes, "twicing").double()(sequences, use_cache=False).logits
        values[mode] = relative_error(got, truth[:, sizes.length - 1 :])
        if not values[mode] <= FLOORS[mode]:
            wrong.append(f"{mode}: relative error of the logits {values[mode]:.2g}, allowed {FLOORS[mode]:.2g}")
    if wrong:
        raise Wrong("; ".join(wrong), values)
    return values


def attack(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """FGSM and PGD on a filtered ViT: gradients finite and not zero, and the verdicts those of the CPU."""
    from transformers import ViTImageProcessorPil

    from ...robustness.attacks import check_gradients, fgsm_withstood, pgd_withstood
    from ...robustness.classifier import PixelClassifier

    sizes = TINY if bench.tiny else FULL
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(8 if bench.tiny else 64, 3, sizes.image, sizes.image, generator=generator)
    classifiers = {
        device: PixelClassifier(build("ViT", sizes, "twicing").to(device), ViTImageProcessorPil())
        for device in ("cpu", bench.device)
    }
    with torch.no_grad():
        labels = classifiers["cpu"](images).argmax(-1)  # without a change it is always right
    verdicts = {
        device: {
            "fgsm": fgsm_withstood(classifier, images, labels, _EPSILON, 32),
            "pgd": pgd_withstood(classifier, images, labels, _EPSILON, 32, steps=_PGD_STEPS),
        }
        for device, classifier in classifiers.items()
    }
    values: dict[str, Any] = {"gradients": check_gradients(classifiers[bench.device], images, labels, 32)}
    for name, found in verdicts[bench.device].items():
        values[name] = float(found.double().mean())
        values[f"{name}_same_as_cpu"] = float((found == verdicts["cpu"][name]).double().mean())
    same = min(values["fgsm_same_as_cpu"], values["pgd_same_as_cpu"])
    if values["gradients"]["zero_margin"] or not same >= 0.9:
        raise Wrong(f"gradients should not vanish, and verdicts be those of the CPU for 90 %: {values}", values)
    return values


def look(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """What the lens measures of every head, in float32 on the device against float64 on the CPU."""
    from ...lens.run import inspect_model

    sizes = TINY if bench.tiny else FULL
    model = build("ViT", sizes, "twicing")
    found = {}
    for device, dtype in (("cpu", torch.float64), (bench.device, torch.float32)):
        pixels = given("DINOv2", sizes)["pixel_values"].to(device, dtype)
        report = inspect_model(model.to(device, dtype), pixels, measures="summary", spectra="none", noise=0)
        heads = [head for layer in report.layers for head in layer.heads]
        found[dtype] = {name: torch.tensor([getattr(head, name) for head in heads]).double() for name in _MEASURES}
    values = {name: relative_error(found[torch.float32][name], found[torch.float64][name]) for name in _MEASURES}
    if not max(values.values()) <= 1e-3:
        raise Wrong(f"measures differ from those in float64: {values}, allowed 1e-3", values)
    return values
