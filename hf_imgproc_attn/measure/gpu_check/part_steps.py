"""Part d: what a user waits for: training steps and decoding of GPT-2 small and ViT-B, stock against variants.

A training step is forward, backward and AdamW, under autocast in bfloat16 with weights in float32; decoding is one
token with a full cache, in bfloat16. Stock model and variant take turns. What is compiled comes last: it takes longest
to prepare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from ... import ImgProcGPT2Config, ImgProcGPT2LMHeadModel, ImgProcViTConfig, ImgProcViTForImageClassification
from ..benchmark.decoding import build_on, model_step
from ..benchmark.timing import interleave, peak_memory
from ..benchmark.whole_models import GPT2_SMALL, GPT2_TINY, STOCK, VARIANTS, VIT_BASE, VIT_TINY
from .parts import Bench, Case

TEXTS, IMAGES = 8, 64
"""In a step, on a GPU; in the rehearsal two."""
DECODED = {"twicing": VARIANTS["twicing in all layers"], "bilateral": VARIANTS["bilateral"]}
_ORDER = (
    "twicing in all layers",
    "bilateral",
    "bilateral_twicing",
    "bilateral_gaussian",
    "twicing in the last 3 layers",
)
_COMPILED = ("twicing in all layers", "bilateral")


def cases(bench: Bench) -> list[Case]:
    """Eager steps, then decoding, then everything compiled."""
    lengths = (15, 31) if bench.tiny else (1024, 4096)
    backbones = ("GPT-2 small", "ViT-B")
    steps = [(backbone, name) for name in _ORDER for backbone in backbones]
    compiled_steps = [(backbone, name) for name in _COMPILED for backbone in backbones]
    decoded = list(DECODED)
    if bench.tiny:  # one of each is enough to rehearse
        compiled_steps, decoded = compiled_steps[:1], decoded[:1]
    found: list[Case] = []

    def step(backbone: str, name: str, compiled: bool) -> None:
        about = {"what": "training step", "model": backbone, "variant": name, "compiled": compiled}
        words = f"{'compiled ' * compiled}training step, {backbone}, {name}"
        run = partial(training_step, bench, backbone, name, compiled)
        found.append(Case(words, run, 180.0 if compiled else 60.0, about))

    def decoding(length: int, name: str, compiled: bool) -> None:
        about = {
            "what": f"decoding after {length:,} tokens",
            "model": backbones[0],
            "variant": name,
            "compiled": compiled,
        }
        words = f"{'compiled ' * compiled}decoding after {length} tokens, {name}"
        run = partial(decoding_step, bench, length, name, compiled)
        found.append(Case(words, run, 150.0 if compiled else 60.0, about))

    for backbone, name in steps[:4]:
        step(backbone, name, False)
    for length in lengths:
        for name in DECODED:
            decoding(length, name, False)
    for backbone, name in steps[4:]:
        step(backbone, name, False)
    for backbone, name in compiled_steps:
        step(backbone, name, True)
    for name in decoded:
        decoding(lengths[0], name, True)
    return found


def _compiler(bench: Bench) -> str:
    return "aot_eager" if bench.tiny else "inductor"


def make_step(
    bench: Bench, backbone: str, variant: dict[str, Any] | None, compiled: bool
) -> tuple[Callable[[], object], str]:
    """A training step, and what it works on in words."""
    generator = torch.Generator().manual_seed(0)
    make: Callable[[], Any]
    if backbone == "GPT-2 small":
        sizes = {**(GPT2_TINY if bench.tiny else GPT2_SMALL), "bos_token_id": 0, "eos_token_id": 0}
        if bench.tiny:
            sizes["n_layer"] = 1 if compiled else 3  # one of the variants boosts three
        if variant is None:
            make = partial(GPT2LMHeadModel, GPT2Config(**sizes))
        else:
            make = partial(ImgProcGPT2LMHeadModel, ImgProcGPT2Config(**sizes, **variant))
        batch = 2 if bench.tiny else TEXTS
        ids = torch.randint(sizes["vocab_size"], (batch, sizes["n_positions"]), generator=generator)
        inputs = {"input_ids": ids, "labels": ids}
        words = f"{batch} texts of {sizes['n_positions']} tokens"
    else:
        sizes = {**VIT_TINY, "num_hidden_layers": 3} if bench.tiny else VIT_BASE
        if variant is None:
            make = partial(ViTForImageClassification, ViTConfig(**sizes))
        else:
            make = partial(ImgProcViTForImageClassification, ImgProcViTConfig(**sizes, **variant))
        batch, side = 2 if bench.tiny else IMAGES, sizes["image_size"]
        inputs = {
            "pixel_values": torch.randn(batch, 3, side, side, generator=generator),
            "labels": torch.arange(batch),
        }
        words = f"{batch} images of {(side // sizes['patch_size']) ** 2 + 1} tokens"
    model = build_on(bench.device, make).train()
    inputs = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    forward: Callable[..., Any] = torch.compile(model, backend=_compiler(bench), dynamic=False) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()

    return step, words


def training_step(bench: Bench, backbone: str, name: str, compiled: bool, seconds_left: float) -> dict[str, Any]:
    """A variant's step beside the stock model's."""
    calls, peaks, words = {}, {}, ""
    for which, variant in ((STOCK, None), (name, VARIANTS[name])):
        calls[which], words = make_step(bench, backbone, variant, compiled)
        calls[which]()  # compiles and tunes, makes gradients and the optimiser's state
        # Beyond what was held before the call, so the other model's weights do not count.
        peaks[which] = peak_memory(calls[which], bench.device) if bench.device == "cuda" else None
    return _values(bench, calls, name) | {
        "work": words,
        "peak_mib": peaks[name],
        "stock_peak_mib": peaks[STOCK],
    }


def decoding_step(bench: Bench, length: int, name: str, compiled: bool, seconds_left: float) -> dict[str, Any]:
    """A variant's decoding step beside the stock model's."""
    sizes = {**({**GPT2_TINY, "n_layer": 1} if bench.tiny else GPT2_SMALL), "n_positions": length + 1}
    compiler = _compiler(bench) if compiled else None
    with torch.no_grad():
        calls = {
            which: model_step(length, sizes, variant, bench.device, torch.bfloat16, compiler)
            for which, variant in ((STOCK, None), (name, DECODED[name]))
        }
    return _values(bench, calls, name) | {"work": f"one token after {length:,}"}


def _values(bench: Bench, calls: dict[str, Callable[[], object]], name: str) -> dict[str, Any]:
    budget = 0.0 if bench.tiny else 2.5
    # By the processor's clock, waiting for the device: launching is part of what a user waits for.
    spreads = interleave(calls, STOCK, budget=budget, device=bench.device)
    return {
        **spreads[name].fields(),
        "stock_milliseconds": spreads[STOCK].milliseconds,
    }
