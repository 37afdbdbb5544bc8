"""What is measured of one layer while the model runs: its heads, what their logits are made of, spectra and maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..models.any_fields import MAX_SPECIAL_TOKENS
from ..models.any_layers import AttentionLayer
from ..models.backend_call import FilterCall
from ..models.layer_summary import filter_summary
from .exact_parts import first_layer_parts
from .heads import HeadSums, Tokens, measure_heads
from .maps import filter_maps
from .observation import own_filter
from .options import LISTED_LENGTH, LensOptions
from .report import HeadReport, LayerReport
from .rows import has_operator
from .shares import decompose_by_means, summed_up, variance_shares
from .spectrum import DENSE_LENGTH, dense_spectrum, iterative_spectrum, layer_matrices
from .tokens import measure_tokens, side_by_side

EXACT_ERROR = 1e-3
"""Parts whose sum differs more from queries or keys, relative to their norm, are not parts of them."""

Skip = Callable[[str], None]
"""Is told what is not measured, and why."""


def tokens_of(
    module: nn.Module,
    shape: tuple[int, int],
    inputs: tuple[torch.Tensor | None, torch.Tensor | None],
    real: torch.Tensor | None,
    options: LensOptions,
    skip: Skip,
) -> Tokens:
    """What is known of the tokens of a layer.

    Args:
        module: the attention module.
        shape: samples and tokens of its queries.
        inputs: the model's token numbers and images; None: it has none.
        real: boolean ``[batch, length]`` or None.
        options: of the look.
        skip: see :data:`Skip`.

    Raises:
        ValueError: for a number of special tokens that does not fit the grid.
    """
    ids, pixels = inputs
    if not isinstance(pixels, torch.Tensor):
        return Tokens(real)
    length, grid = shape[1], _grid(module, pixels)
    if grid is None and isinstance(ids, torch.Tensor) and tuple(ids.shape) == shape:  # the texts of a model of both
        return Tokens(real)
    special = -1 if grid is None else length - grid[0] * grid[1]
    if grid is None or not 0 <= special <= MAX_SPECIAL_TOKENS:
        special, grid = options.num_special_tokens or 0, None
        skip("distances and position bandwidths: the grid of patches is not known")
    elif options.num_special_tokens not in (None, special):
        raise ValueError(
            f"num_special_tokens must be {special}, since {length} tokens are {grid[0]} x {grid[1]} patches "
            f"and {special} more, got {options.num_special_tokens}"
        )
    return Tokens(real, special, grid, has_places=grid is not None)


def chosen_token(tokens: Tokens, length: int, options: LensOptions) -> int:
    """Whose maps are shown: the one that was asked for, or one in the middle of the first sample.

    Raises:
        ValueError: for a token that there is not, or that is padding.
    """
    if length < 2:
        raise ValueError(f"inputs must have at least 2 tokens, got {length}: a filter of one token returns it")
    chosen = options.token
    if chosen is not None and chosen >= length:
        raise ValueError(f"token must be below the number of tokens, {length}, got {chosen}")
    if chosen is None and tokens.grid is not None:
        return _at_place(tokens, tokens.grid, options.place)
    if tokens.real is None:
        return length // 2 if chosen is None else chosen
    real = tokens.real[0].nonzero()[:, 0].tolist()
    if chosen is not None and chosen not in real:
        raise ValueError(f"token must be a real one of the first sample, and {chosen} is padding")
    return int(real[len(real) // 2]) if chosen is None else chosen


def check_finite(layer: AttentionLayer, call: FilterCall, output: torch.Tensor, real: torch.Tensor | None) -> None:
    """Refuse activations that are not finite.

    Raises:
        ValueError: names the layer and the head.
    """
    for name, x in (("query", call.query), ("key", call.key), ("value", call.value), ("output", output)):
        finite = x.isfinite().all(-1)
        if real is not None:
            finite = finite | ~real[:, None].to(x.device)
        if not bool(finite.all()):
            head = int((~finite).any(-1).any(0).nonzero()[0, 0])
            raise ValueError(
                f"activations must be finite: the {name} of {layer.name} (layer {layer.place}), head {head}, has NaN "
                "or infinite numbers"
            )


def add_heads(module: nn.Module, call: FilterCall, output: torch.Tensor, tokens: Tokens, layer: LayerReport) -> None:
    """Heads, and tokens before and after the filter."""
    new_value = call.new_value
    layer.tokens["values"] = measure_tokens(side_by_side(new_value), tokens.real)
    layer.tokens["filtered"] = measure_tokens(side_by_side(output), tokens.real)
    noise = _method_noise(new_value, output, tokens.real)
    layer.heads = _head_reports(measure_heads(call, tokens), noise, _learned(module))


def add_pictures(
    call: FilterCall,
    output: torch.Tensor,
    ids: torch.Tensor | None,
    tokens: Tokens,
    token: int,
    layer: LayerReport,
) -> None:
    """Maps of one token, and what the filter removes of each; of inputs that are not too long."""
    if call.query.shape[-2] <= LISTED_LENGTH:
        removed = call.new_value[0] - output[0]
        layer.method_noise_map = removed.double().norm(dim=-1).tolist()
        layer.maps = filter_maps(call, ids, tokens.real, token)


def add_shares(call: FilterCall, ids: torch.Tensor | None, tokens: Tokens, layer: LayerReport, skip: Skip) -> None:
    """What the logits are made of, by mean effects."""
    types = ids if isinstance(ids, torch.Tensor) else None
    if types is not None and tuple(types.shape) != (call.query.shape[0], call.query.shape[-2]):
        types = None
    if call.query.shape[0] < 2:
        maps = "" if call.positions else ", and maps of position and content"
        skip(f"kernel decomposition by mean effects{maps}: at least 2 samples are needed, got 1")
        return
    shares = summed_up(decompose_by_means(call, types, tokens.real))
    for head in layer.heads:
        head.shares = {name: values[head.head] for name, values in shares.items()}


def add_exact_shares(
    model: nn.Module,
    place: AttentionLayer,
    call: FilterCall,
    entering: torch.Tensor | None,
    tokens: Tokens,
    layer: LayerReport,
) -> None:
    """What the logits of the first layer are made of, exactly, where the model adds positions to its tokens."""
    if place.place != 0 or entering is None or call.positions:
        return
    parts = first_layer_parts(model, place, entering, call.query.shape[-2])
    if parts is None or any(
        (sum(held.values()) - x).norm() > EXACT_ERROR * x.norm()
        for held, x in zip(parts, (call.query, call.key), strict=True)
    ):
        return
    exact = variance_shares(call, *parts, tokens.real)
    for head in layer.heads:
        head.exact_shares = {name: values[head.head] for name, values in exact.items()}


def add_spectra(call: FilterCall, tokens: Tokens, layer: LayerReport, kind: str, skip: Skip) -> None:
    """Spectra of A and of the operator of each head, of the first sample."""
    length, real = call.query.shape[-2], tokens.real
    if kind == "none":
        skip("spectra: they were not asked for")
    elif real is not None and int(real[0].sum()) < 2:
        skip("spectra: the first sample has a single real token")
    elif length <= DENSE_LENGTH:
        for head, matrix, operator in zip(layer.heads, *layer_matrices(call, real), strict=True):
            head.filter_spectrum = head.operator_spectrum = dense_spectrum(matrix)
            if has_operator(call):
                head.operator_spectrum = dense_spectrum(operator)
    elif kind == "dense":
        skip(f'spectra: {length} tokens are more than {DENSE_LENGTH} (spectra="iterative" finds the largest)')
    elif real is not None and not bool(real[0].all()):
        skip("iterative spectra: the first sample has padding")
    else:
        for head in layer.heads:
            head.filter_spectrum = head.operator_spectrum = iterative_spectrum(call, head.head, boosted=False)
            if has_operator(call):
                head.operator_spectrum = iterative_spectrum(call, head.head, boosted=True)


def kind_of(layer: AttentionLayer) -> str:
    """The filter of a layer in words."""
    kernel = own_filter(layer.module)
    if kernel is None:
        return "stock attention"
    spec = kernel.spec
    parts = [f"content kernel {spec.content_kernel}", f"position kernel {spec.position_kernel}"]
    usual = {
        "normalisation": "softmax",
        "boosting": "none",
        "residual": "standard",
        "feedback": "none",
        "gate": "none",
    }
    parts += [f"{name} {getattr(spec, name)}" for name, value in usual.items() if getattr(spec, name) != value]
    return ", ".join(parts)


def _grid(module: nn.Module, pixels: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches of the given images."""
    patch = getattr(getattr(module, "config", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else patch
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or pixels.ndim != 4:
        return None
    return pixels.shape[-2] // int(sides[0]), pixels.shape[-1] // int(sides[1])


def _at_place(tokens: Tokens, grid: tuple[int, int], place: tuple[float, float] | None) -> int:
    """The patch there; without a place the one in the middle."""
    across, down = (0.5, 0.5) if place is None else place
    row, column = (min(int(share * side), side - 1) for share, side in zip((down, across), grid, strict=True))
    return tokens.special + row * grid[1] + column


def _learned(module: nn.Module) -> list[dict[str, float]]:
    """What the layer's own filter holds, one dictionary a head."""
    if own_filter(module) is None:
        return []
    return [
        {name: value for name, value in row.items() if name not in ("layer", "head") and isinstance(value, float)}
        for row in filter_summary(module).rows
    ]


def _method_noise(value: torch.Tensor, output: torch.Tensor, real: torch.Tensor | None) -> list[float]:
    """|V - p(A) V|^2 / |V|^2 of each head."""
    if value.shape != output.shape:
        return [float("nan")] * output.shape[1]
    weight = 1.0 if real is None else real.to(value.device)[:, None, :, None].double()
    left = ((value - output).double().square() * weight).sum((0, 2, 3))
    return (left / (value.double().square() * weight).sum((0, 2, 3))).tolist()


def _head_reports(sums: HeadSums, method_noise: list[float], learned: list[dict[str, float]]) -> list[HeadReport]:
    reports = []
    for head in range(len(method_noise)):
        received = sums.received[head]
        reports.append(
            HeadReport(
                head=head,
                entropy=float(sums.entropy[head]),
                entropy_share=float(sums.entropy_share[head]),
                logit_std=float(sums.logit_std[head]),
                content_bandwidth=float(sums.content_bandwidth[head]),
                distance=float(sums.mean_distance_sq[head].sqrt()),
                position_bandwidth=float(sums.position_bandwidth[head]),
                sink_weight=float(sums.sink_weight[head]),
                sink_value_ratio=float(sums.sink_value_ratio[head]),
                received_most=float(received.max()),
                received_most_at=int(received.argmax()),
                method_noise=method_noise[head],
                received=received.tolist() if len(received) <= LISTED_LENGTH else [],
                learned=learned[head] if learned else {},
            )
        )
    return reports
