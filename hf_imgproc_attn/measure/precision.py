"""How accurate each kernel is in float32 and bfloat16, beside plain attention in the same precision.

    python -m hf_imgproc_attn.measure.precision docs/precision.md

One layer filters random tokens whose query, key and value bfloat16 holds exactly, so that one result in float64 (the
dense form) is the truth for every precision. An error is the root mean square of the difference over the root mean
square of the truth, over all heads; the tables give it as a multiple of the error of torch's own
``scaled_dot_product_attention`` in the same precision on the same tokens.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UsageError, exit_code
from ..models.boost_depth import LayerState
from ..models.boost_operators import BOOSTING
from ..models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from ..models.configuration_imgproc_vit import ImgProcViTConfig
from ..models.layer_filter import AttentionFilter
from ..models.layer_inputs import LayerInputs
from ..models.modeling_shared import SUPPORTED_IMPLEMENTATIONS
from ..models.spec_axes import BOOSTINGS, CONTENT_KERNELS, POSITION_KERNELS
from ..models.visibility import Visibility
from ..output_paths import check_output_file, write_or_keep

COMMAND = "python -m hf_imgproc_attn.measure.precision docs/precision.md"
PRECISIONS = (torch.float32, torch.bfloat16)
HEADS, HEAD_DIM = 8, 64
Fields = dict[str, Any]


class Data(NamedTuple):
    """One kind of tokens.

    name: as the page calls it.
    sides: of the grid: one for text, two for patches.
    num_class_tokens: leading tokens without a place.
    """

    name: str
    sides: tuple[int, ...]
    num_class_tokens: int

    @property
    def is_causal(self) -> bool:
        """Text is read in one direction."""
        return len(self.sides) == 1


TEXT = Data("text, 512 tokens, causal", (512,), 0)
IMAGES = Data("images, 14 x 14 patches and a class token", (14, 14), 1)


def cases() -> dict[str, Fields]:
    """Configuration fields of everything that is measured, by the name of its row."""
    rows: dict[str, Fields] = {}
    for content in CONTENT_KERNELS:
        rows[f"content `{content}`"] = {"content_kernel": content, "position_kernel": "none"}
    for position in POSITION_KERNELS:
        if position not in ("additive", "none"):  # for a single layer both are the content kernel alone
            rows[f"position `{position}`"] = {"position_kernel": position}
    rows["content and position `gaussian`"] = {"content_kernel": "gaussian", "position_kernel": "gaussian"}
    for boosting in BOOSTINGS:
        if boosting in BOOSTING and boosting != "none":
            rows[f"boosting `{boosting}`"] = {"position_kernel": "none", "boosting": boosting}
    return rows


def _random(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers that bfloat16 holds exactly, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def build_layer(fields: Fields, data: Data) -> AttentionFilter:
    """The second layer of a model with these fields; learned logits and projections are random, bandwidths default."""
    config_class: Any = ImgProcGPT2Config if len(data.sides) == 1 else ImgProcViTConfig
    config = config_class(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_hidden_layers=2, **fields)
    layer = AttentionFilter(
        config.layer_specs[1],
        config,
        layer_idx=1,
        head_dim=HEAD_DIM,
        scaling=HEAD_DIM**-0.5,
        longest_side=max(data.sides),
        layer_norm_eps=1e-5,
        num_class_tokens=data.num_class_tokens,
    )
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(layer.named_parameters()):
            if name.endswith(("class_token", "relative_buckets")):
                parameter.copy_(_random(*parameter.shape, seed=100 + seed))
            elif parameter.ndim == 2:
                parameter.copy_((_random(*parameter.shape, seed=100 + seed) * parameter.shape[1] ** -0.5).bfloat16())
    return layer


def inputs_for(layer: AttentionFilter, data: Data) -> dict[str, torch.Tensor]:
    """Keyword arguments of the layer in float64; coordinates are integers."""
    length = data.num_class_tokens + torch.Size(data.sides).numel()
    names = ("query", "key", "value", "previous_value")
    given = {name: _random(1, HEADS, length, HEAD_DIM, seed=seed) for seed, name in enumerate(names)}
    if layer.spec.position_kernel == "untied":
        given["position_states"] = _random(1, length - data.num_class_tokens, HEADS * HEAD_DIM, seed=9)
    grid = torch.cartesian_prod(*(torch.arange(side) - side // 2 for side in data.sides)).view(-1, len(data.sides))
    given["coordinates"] = torch.nn.functional.pad(grid, (0, 0, data.num_class_tokens, 0)).unsqueeze(0)
    return given


def apply_layer(
    layer: AttentionFilter, given: dict[str, torch.Tensor], data: Data, implementation: str
) -> torch.Tensor:
    """The output of a layer for what :func:`inputs_for` has made, ``[1, heads, length, head_dim]``."""
    length = given["query"].shape[-2]
    inputs = LayerInputs(
        Visibility(length, length, data.is_causal),
        given["coordinates"],
        contiguous=True,
        backend="reference" if implementation == "eager" else "auto",
        position_states=given.get("position_states"),
        state=LayerState(previous_value=given["previous_value"]),
    )
    output: torch.Tensor = layer(given["query"], given["key"], given["value"], inputs)[0]
    return output


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _cast(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


@torch.no_grad()
def plain_errors(data: Data) -> dict[torch.dtype, float]:
    """The yardstick: torch's attention on the same query, key and value."""
    attention = torch.nn.functional.scaled_dot_product_attention
    given = inputs_for(build_layer({"position_kernel": "none"}, data), data)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    exact = attention(query, key, value, is_causal=data.is_causal)
    return {
        dtype: relative_error(
            attention(query.to(dtype), key.to(dtype), value.to(dtype), is_causal=data.is_causal), exact
        )
        for dtype in PRECISIONS
    }


@torch.no_grad()
def measure(fields: Fields, data: Data) -> dict[tuple[torch.dtype, str], float]:
    """Errors of one row, by precision and implementation."""
    layer = build_layer(fields, data)
    given = inputs_for(layer, data)
    exact = apply_layer(layer.double(), given, data, "eager")
    errors = {}
    for dtype in PRECISIONS:
        for implementation in SUPPORTED_IMPLEMENTATIONS:
            got = apply_layer(layer.to(dtype), _cast(given, dtype), data, implementation)
            errors[dtype, implementation] = relative_error(got, exact)
            layer.double()
    return errors


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table(data: Data) -> list[str]:
    """The lines of one table."""
    plain = plain_errors(data)
    columns = [(dtype, implementation) for dtype in PRECISIONS for implementation in SUPPORTED_IMPLEMENTATIONS]
    names = [f"{str(dtype).removeprefix('torch.')} {implementation}" for dtype, implementation in columns]
    lines = [f"## {data.name[0].upper()}{data.name[1:]}", ""]
    yardstick = " and ".join(f"{error:.1e} in {str(dtype).removeprefix('torch.')}" for dtype, error in plain.items())
    lines += [f"Plain attention's own error: {yardstick}.", ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row, fields in cases().items():
        errors = measure(fields, data)
        ratios = " | ".join(_ratio(errors[column] / plain[column[0]]) for column in columns)
        lines.append(f"| {row} | {ratios} |")
    return [*lines, ""]


def page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# Precision",
        "",
        "Written by",
        "",
        "```",
        COMMAND,
        "```",
        "",
        "Error of one layer's output against float64, as a multiple of the error that torch's own",
        "`scaled_dot_product_attention` has in the same precision on the same tokens (1 = as accurate as plain",
        "attention). `eager` computes in float32 at least and rounds its output once; `sdpa` is the fast path of the",
        "shape, fused calls in the given precision or blocks in float32 at least. Rotary positions round query and",
        "key once more; feature columns of the `gaussian` position kernel in float32 hold p²/h², which costs digits",
        "in narrow heads of long texts (still far below bfloat16's error).",
        "",
        f"{HEADS} heads of width {HEAD_DIM}, standard normal query, key and value, default bandwidths, which are not",
        f"learned. Measured on {platform.machine()} with torch {torch.__version__.split('+')[0]}, on the CPU.",
        "",
    ]
    for data in (TEXT, IMAGES):
        lines += table(data)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the page.

    Args:
        arguments: of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hf_imgproc_attn.measure.precision", description=__doc__.split("\n")[0]
    )
    parser.add_argument("output", type=Path, help="the Markdown file to write")
    output = parser.parse_args(arguments).output

    def work() -> None:
        check_output_file(output)
        if not output.parent.is_dir():
            raise UsageError(f"output must be in a folder that exists, got {str(output)!r}")
        text = page()
        write_or_keep(output, lambda file: file.write_text(text, encoding="utf-8"))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
