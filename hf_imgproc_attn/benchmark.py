"""What a variant costs: one attention layer of each preset, timed against the stock attention layer in the same run.

A layer is the whole attention module (projections, filter, output projection) of a model's second layer, which may
look back at the first, called with what the model really hands to it. All candidates of a backbone take turns, so that
a slow moment of the machine meets all of them; what is reported is the median over the rounds of candidate time /
stock time *of the same round*, with the quartiles.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2Model, ViTConfig, ViTModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.vit.modeling_vit import ViTAttention

from . import __version__
from .models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from .models.configuration_imgproc_vit import ImgProcViTConfig
from .models.filter_spec import PRESETS
from .models.modeling_imgproc_gpt2 import ImgProcGPT2Model
from .models.modeling_imgproc_vit import ImgProcViTModel

STOCK = "stock"
DIRECTIONS = ("forward", "forward + backward")


@dataclass(frozen=True)
class Shape:
    """The shape of one comparison: ``[batch, heads, length, head_dim]``."""

    backbone: str
    batch: int
    heads: int
    length: int
    head_dim: int = 64


@dataclass(frozen=True)
class Timing:
    """One row of the result; the ratio is to stock attention in the same round, quartiles in brackets."""

    backbone: str
    variant: str
    direction: str
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


FULL = (Shape("gpt2", batch=2, heads=12, length=1024), Shape("vit", batch=16, heads=12, length=197))
QUICK = (Shape("gpt2", batch=1, heads=2, length=48), Shape("vit", batch=2, heads=2, length=17))


def run(*, quick: bool = False, threads: int | None = None, output: str | Path | None = None) -> list[Timing]:
    """Time all presets on both backbones, print a table and write the result.

    Args:
        quick: tiny shapes and few rounds; checks that everything runs, the ratios mean nothing.
        threads: CPU threads for torch, restored afterwards; None leaves torch's choice.
        output: a JSON file, overwritten; None writes none.

    Returns:
        One :class:`Timing` a backbone, variant and direction.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        timings = [timing for shape in (QUICK if quick else FULL) for timing in time_shape(shape, 3 if quick else 15)]
        used_threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    print(render(timings))
    if output is not None:
        record = {
            "quick": quick,
            "threads": used_threads,
            "dtype": "float32",
            "machine": platform.machine(),
            "versions": {
                "hf_imgproc_attn": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "shapes": [asdict(shape) for shape in (QUICK if quick else FULL)],
            "timings": [asdict(timing) for timing in timings],
        }
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return timings


def time_shape(shape: Shape, rounds: int) -> list[Timing]:
    """Time stock attention and all presets on one shape; the first round only warms up."""
    calls = {STOCK: layer_call(shape, None), **{name: layer_call(shape, name) for name in PRESETS}}
    timings = []
    for direction in DIRECTIONS:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call(direction)
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            ratios = [mine / stock for mine, stock in zip(times[1:], seconds[STOCK][1:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1000 * statistics.median(times[1:])
            timings.append(Timing(shape.backbone, name, direction, milliseconds, middle, low, high))
    return timings


def layer_call(shape: Shape, preset: str | None) -> Callable[[str], None]:
    """A function that runs one attention layer in a direction; ``preset`` None is the stock layer."""
    torch.manual_seed(0)
    model, inputs = build_model(shape, preset)
    kind = GPT2Attention if shape.backbone == "gpt2" else ViTAttention
    *_, layer = (module for module in model.modules() if isinstance(module, kind))
    arguments, keywords = capture_call(model, layer, inputs)
    hidden_states, *rest = arguments
    hidden_states = hidden_states.detach().requires_grad_()
    gradient = torch.randn_like(hidden_states)
    trained = [hidden_states, *layer.parameters()]

    def call(direction: str) -> None:
        if direction == "forward":
            with torch.no_grad():
                layer(hidden_states, *rest, **keywords)
            return
        output = layer(hidden_states, *rest, **keywords)[0]
        torch.autograd.grad(output, trained, gradient, allow_unused=True)

    return call


def build_model(shape: Shape, preset: str | None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with two layers, without dropout, and an input of the shape; ``preset`` None is the stock model."""
    width = shape.heads * shape.head_dim
    if shape.backbone == "gpt2":
        fields: dict[str, Any] = {
            "n_layer": 2, "n_head": shape.heads, "n_embd": width, "n_positions": shape.length, "vocab_size": 64,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False, "bos_token_id": 0,
            "eos_token_id": 0,
        }  # fmt: skip
        inputs = {"input_ids": torch.randint(64, (shape.batch, shape.length))}
        if preset is None:
            return GPT2Model(GPT2Config(**fields)), inputs
        return ImgProcGPT2Model(ImgProcGPT2Config.from_preset(preset, **fields)), inputs
    side = round((shape.length - 1) ** 0.5)
    fields = {
        "num_hidden_layers": 2, "num_attention_heads": shape.heads, "hidden_size": width, "intermediate_size": width,
        "image_size": 4 * side, "patch_size": 4,
    }  # fmt: skip
    inputs = {"pixel_values": torch.randn(shape.batch, 3, 4 * side, 4 * side)}
    if preset is None:
        return ViTModel(ViTConfig(**fields)), inputs
    return ImgProcViTModel(ImgProcViTConfig.from_preset(preset, **fields)), inputs


def capture_call(
    model: nn.Module, layer: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a model calls one of its modules."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments, keywords))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return calls[0]


def render(timings: list[Timing]) -> str:
    """The table: one row a backbone and variant, time and ratio in both directions."""
    rows = [["backbone", "variant"] + [f"{direction}: ms, x stock (quartiles)" for direction in DIRECTIONS]]
    cells: dict[tuple[str, str], list[str]] = {}
    for item in timings:
        text = f"{item.milliseconds:.2f}  {item.ratio:.2f} ({item.ratio_low:.2f} to {item.ratio_high:.2f})"
        cells.setdefault((item.backbone, item.variant), []).append(text)
    rows += [[*key, *texts] for key, texts in cells.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
