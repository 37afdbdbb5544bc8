"""How accurate each kernel is in float32 and bfloat16, beside plain attention in the same precision.

    imgproc-attn precision docs/precision.md --force

One layer filters random tokens whose query, key and value bfloat16 holds exactly, so that one result in float64 (the
dense form) is the truth for every precision. An error is the root mean square of the difference over the root mean
square of the truth, over all heads, of the output, of the gradients of query, key and value, and of the gradients of
the layer's parameters (bandwidths, gains, bucket and class-token logits); the tables give it as a multiple of the
error of torch's own ``scaled_dot_product_attention`` in the same precision on the same tokens.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backbones import BACKBONES
from ..errors import UsageError
from ..markdown_tables import table_lines
from ..models.boost_depth import LayerState
from ..models.boost_operators import BOOSTING, ONE_PASS
from ..models.kernel_content import CONTENT_LOGITS
from ..models.layer_filter import AttentionFilter
from ..models.layer_inputs import LayerInputs
from ..models.modeling_shared import SUPPORTED_IMPLEMENTATIONS
from ..models.spec_axes import BOOSTINGS, POSITION_KERNELS
from ..models.visibility import Visibility
from ..output_paths import check_new_files, write_or_keep

COMMAND = "imgproc-attn precision docs/precision.md --force"
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


ALL_DATA = (
    Data("text, 256 tokens, causal", (256,), 0),
    Data("text, 1,024 tokens, causal", (1024,), 0),
    Data("images, 14 x 14 patches and a class token", (14, 14), 1),
)


class Errors(NamedTuple):
    """Relative errors, or multiples of plain attention's.

    output: of the output.
    inputs: the largest of the gradients of query, key and value.
    parameters: the largest of the gradients of the layer's parameters; None where it has none.
    """

    output: float
    inputs: float
    parameters: float | None = None

    def over(self, plain: Errors) -> str:
        """As multiples of plain attention's errors: output, inputs, parameters (beside the inputs of plain)."""
        found = [self.output / plain.output, self.inputs / plain.inputs]
        if self.parameters is not None:
            found.append(self.parameters / plain.inputs)
        return " / ".join(_ratio(value) for value in found)


def cases() -> dict[str, Fields]:
    """Configuration fields of everything that is measured, by the name of its row."""
    rows: dict[str, Fields] = {}
    for content in CONTENT_LOGITS:  # `cosine` is the dot product of other vectors
        rows[f"content `{content}`"] = {"content_kernel": content, "position_kernel": "none"}
    for position in POSITION_KERNELS:
        # For a single layer two are the content kernel alone; `forget` projects tokens.
        if position not in ("additive", "forget", "none"):  # for a single layer both are the content kernel alone
            rows[f"position `{position}`"] = {"position_kernel": position}
    rows["content and position `gaussian`"] = {"content_kernel": "gaussian", "position_kernel": "gaussian"}
    for boosting in BOOSTINGS:
        # What is finished row by row is as precise as the content kernel alone.
        if boosting in BOOSTING and boosting not in ("none", *ONE_PASS):
            rows[f"boosting `{boosting}`"] = {"position_kernel": "none", "boosting": boosting}
    return rows


def _random(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers that bfloat16 holds exactly, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def build_layer(fields: Fields, data: Data) -> AttentionFilter:
    """The second layer of a model with these fields; learned logits and projections are random, bandwidths default."""
    configs = [row.our_class(row.config) for row in BACKBONES.values()]
    config_class: Any = next(kind for kind in configs if kind.position_axes == len(data.sides))
    config = config_class(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        **{"learn_bandwidths": True, **fields},
    )
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


Results = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]
"""The output, the gradients of the inputs and those of the parameters."""


def _gradients(
    output: torch.Tensor, leaves: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of a fixed random function of the output: of the inputs, and of the parameters."""
    upstream = _random(*output.shape, seed=50).to(output.dtype)
    found = list(torch.autograd.grad(output, [*leaves, *parameters], upstream))
    return found[: len(leaves)], found[len(leaves) :]


def _errors(got: Results, exact: Results) -> Errors:
    inputs = [relative_error(mine, truth) for mine, truth in zip(got[1], exact[1], strict=True)]
    parameters = [relative_error(mine, truth) for mine, truth in zip(got[2], exact[2], strict=True)]
    return Errors(relative_error(got[0], exact[0]), max(inputs), max(parameters) if parameters else None)


def plain_errors(data: Data) -> dict[torch.dtype, Errors]:
    """The yardstick: torch's attention on the same query, key and value."""
    attention = torch.nn.functional.scaled_dot_product_attention
    given = inputs_for(build_layer({"position_kernel": "none"}, data), data)

    def results(dtype: torch.dtype) -> Results:
        leaves = [given[name].to(dtype).requires_grad_() for name in ("query", "key", "value")]
        query, key, value = leaves
        output = attention(query, key, value, is_causal=data.is_causal)
        return output.detach(), *_gradients(output, leaves, [])

    exact = results(torch.float64)
    return {dtype: _errors(results(dtype), exact) for dtype in PRECISIONS}


def measure(fields: Fields, data: Data) -> dict[tuple[torch.dtype, str], Errors]:
    """Errors of one row, by precision and implementation."""
    layer = build_layer(fields, data)
    given = inputs_for(layer, data)
    names = ("query", "key", "value")

    def results(dtype: torch.dtype, implementation: str) -> Results:
        cast = _cast(given, dtype)
        cast |= {name: cast[name].clone().requires_grad_() for name in names}
        layer.to(dtype)
        scalars = list(layer.scalar_bias.parameters())
        output = apply_layer(layer, cast, data, implementation)
        found = output.detach(), *_gradients(output, [cast[name] for name in names], scalars)
        layer.double()
        return found

    exact = results(torch.float64, "eager")
    return {
        (dtype, implementation): _errors(results(dtype, implementation), exact)
        for dtype in PRECISIONS
        for implementation in SUPPORTED_IMPLEMENTATIONS
    }


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table(data: Data) -> list[str]:
    """The lines of one table."""
    plain = plain_errors(data)
    columns = [(dtype, implementation) for dtype in PRECISIONS for implementation in SUPPORTED_IMPLEMENTATIONS]
    names = [f"{str(dtype).removeprefix('torch.')} {implementation}" for dtype, implementation in columns]
    lines = [f"## {data.name[0].upper()}{data.name[1:]}", ""]
    yardstick = " and ".join(
        f"{error.output:.1e} / {error.inputs:.1e} in {str(dtype).removeprefix('torch.')}"
        for dtype, error in plain.items()
    )
    lines += [f"Plain attention's own errors, output / gradients: {yardstick}.", ""]
    rows = []
    for row, fields in cases().items():
        errors = measure(fields, data)
        rows.append([row, *(errors[column].over(plain[column[0]]) for column in columns)])
    return [*lines, *table_lines(["", *names], rows), ""]


def page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# Precision",
        "",
        "Written by",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        "Errors of one layer against float64, as multiples of those that torch's own `scaled_dot_product_attention`",
        "has in the same precision on the same tokens (1 = as accurate as plain attention). Each cell: output / worst",
        "gradient of query, key and value / worst gradient of the layer's bandwidths, gains and bucket or class-token",
        "logits, where it has any (beside plain attention's gradients). `eager` computes in float32 at least and",
        "rounds its output once; `sdpa` is the fast path of the shape, fused calls in the given precision or blocks",
        "in float32 at least. Rotary positions round query and key once more.",
        "",
        f"{HEADS} heads of width {HEAD_DIM}, standard normal query, key and value, default bandwidths, learned.",
        f"Measured on {platform.machine()} with torch {torch.__version__.split('+')[0]}, on the CPU.",
        "",
    ]
    for data in ALL_DATA:
        lines += table(data)
    return "\n".join(lines)


def write(output: Path, *, force: bool = False) -> None:
    """Measure, and write the page.

    Args:
        output: the Markdown file.
        force: replace one that is there.

    Raises:
        UsageError: if it cannot be written, before anything is measured.
    """
    check_new_files([output], force)
    if not output.parent.is_dir():
        raise UsageError(f"output must be in a folder that exists, got {str(output)!r}")
    text = page()
    write_or_keep(output, lambda file: file.write_text(text, encoding="utf-8"))
