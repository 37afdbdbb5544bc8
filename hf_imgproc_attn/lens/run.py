"""Run a model under the lens: one forward pass for the filters, one more for the noise."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.any_fields import MAX_SPECIAL_TOKENS
from ..models.any_layers import AttentionLayer, attention_layers
from ..models.backend_call import FilterCall
from ..models.layer_summary import filter_summary
from .exact_parts import first_layer_parts
from .heads import HeadSums, Tokens, measure_heads
from .maps import filter_maps, small_picture
from .observation import BlockTokens, NotUnderstoodError, observed, own_filter
from .report import HeadReport, LayerReport, Report
from .shares import decompose_by_means, summed_up, variance_shares
from .spectrum import DENSE_LENGTH, dense_spectrum, iterative_spectrum, layer_matrices
from .tokens import gains, measure_tokens, noise_ratio, side_by_side

LISTED_LENGTH = 1024
"""Vectors and maps over tokens are kept in the report up to this length."""
EXACT_ERROR = 1e-3
"""Parts whose sum differs more from queries or keys, relative to their norm, are not parts of them."""


@dataclass(frozen=True)
class LensOptions:
    """What to measure, and how.

    stack: which list of blocks, where a model has several.
    layers: which of its layers; None: all.
    spectra: ``"dense"`` (up to 1,024 tokens), ``"iterative"`` (the largest values also beyond) or ``"none"``.
    noise: standard deviation of the noise in the input, as a share of that of the input; 0: none is put in.
    seed: of the noise.
    token: whose maps are shown; None: one in the middle.
    place: of images: the patch at this place, as shares of width and height, in place of ``token``.
    num_special_tokens: of images: leading tokens that are no patches; None: what is left beside the grid.
    measures: ``"all"``, or ``"summary"``: heads and tokens only, without maps and without what logits are made of.
    """

    stack: str | None = None
    layers: tuple[int, ...] | None = None
    spectra: str = "dense"
    noise: float = 0.1
    seed: int = 0
    token: int | None = None
    place: tuple[float, float] | None = None
    num_special_tokens: int | None = None
    measures: str = "all"

    def __post_init__(self) -> None:
        if self.measures not in ("all", "summary"):
            raise ValueError(f"measures must be all or summary, got {self.measures!r}")
        if self.spectra not in ("dense", "iterative", "none"):
            raise ValueError(f"spectra must be dense, iterative or none, got {self.spectra!r}")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < 1e3:
            raise ValueError(
                f"noise must be a number >= 0 (a share of the input's standard deviation), got {self.noise!r}"
            )
        place = self.place
        if place is not None and not (len(place) == 2 and all(0 <= share <= 1 for share in place)):
            raise ValueError(f"place must be two shares of width and height from 0 to 1, got {place!r}")
        for name in ("seed", "token", "num_special_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor,
    *,
    name: str | None = None,
    data: str = "the given input",
    labels: list[str] | None = None,
    options: LensOptions | None = None,
    **given: Any,
) -> Report:
    """Measure what the self-attention of a model filters. The model is left as it was.

    Args:
        model: one of this package's models, or any of Transformers whose attention goes through its interface, with
            filters or without.
        inputs: what the model is called with, by name; or a tensor of token numbers ``[batch, length]`` or of images
            ``[batch, channels, height, width]``. Two samples or more let position and content be told apart.
        name: of the model, for the report.
        data: what the inputs are, in words.
        labels: the first sample's tokens as text.
        options: see :class:`LensOptions`.
        **given: fields of :class:`LensOptions`, by name.

    Raises:
        ValueError: for a model without such layers, one with several stacks of which none is chosen, a single token,
            or activations that are not finite (layer and head are named).
    """
    options = LensOptions(**given) if options is None else options
    named = _named_inputs(model, inputs)
    layers = _chosen_layers(model, options)
    run = _Run(model, layers, named, options)
    run.report = Report(
        model=name or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        model_type=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        data=data,
        samples=run.batch,
        length=0,
        labels=labels or [],
        noise=options.noise,
    )
    if options.measures == "all" and isinstance(run.pixels, torch.Tensor) and run.pixels.ndim == 4:
        run.report.picture = small_picture(run.pixels[0])
    run.look()
    if options.noise:
        run.look_at_noise()
    return run.report


def _named_inputs(model: nn.Module, inputs: Mapping[str, Any] | torch.Tensor) -> dict[str, Any]:
    if isinstance(inputs, torch.Tensor):
        kind = getattr(model, "main_input_name", "input_ids")
        axes = 4 if kind == "pixel_values" else 2
        if inputs.ndim != axes:
            raise ValueError(f"inputs must have {axes} axes as {kind}, got shape {tuple(inputs.shape)}")
        inputs = {kind: inputs}
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be a tensor or what the model is called with by name, got {inputs!r}")
    named = {name: value for name, value in inputs.items() if name != "labels"}
    if not any(isinstance(value, torch.Tensor) and value.ndim > 0 for value in named.values()):
        raise ValueError(f"inputs must hold a tensor, got {', '.join(named) or 'nothing'}")
    return named


def _chosen_layers(model: nn.Module, options: LensOptions) -> list[AttentionLayer]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model, which is loaded already, got {model!r}")
    found = attention_layers(model)
    stacks = list(dict.fromkeys(layer.stack for layer in found))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention layer that goes through Transformers' attention interface: "
            "the lens sees nothing in it"
        )
    if options.stack is None and len(stacks) > 1:
        raise ValueError(f"{type(model).__name__} has several stacks: choose stack among {', '.join(stacks)}")
    stack = stacks[0] if options.stack is None else options.stack
    if stack not in stacks:
        raise ValueError(f"stack must be among {', '.join(stacks)}, got {stack!r}")
    members = [layer for layer in found if layer.stack == stack]
    if options.layers is None:
        return members
    for index in options.layers:
        if isinstance(index, bool) or not isinstance(index, int) or not -len(members) <= index < len(members):
            raise ValueError(f"layers must be integers from {-len(members)} to {len(members) - 1}, got {index!r}")
    return [members[place] for place in sorted({index % len(members) for index in options.layers})]


class _Run:
    """One look at one model."""

    report: Report

    def __init__(
        self, model: nn.Module, layers: list[AttentionLayer], inputs: dict[str, Any], options: LensOptions
    ) -> None:
        self.model, self.layers, self.inputs, self.options = model, layers, inputs, options
        main = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim > 0)
        is_decoder = layers[0].stack.startswith(("decoder", "model.decoder"))
        side = "decoder_" if is_decoder and f"decoder_{'input_ids'}" in inputs else ""
        self.batch = main.shape[0]
        self.ids = inputs.get(f"{side}input_ids")
        mask = inputs.get(f"{side}attention_mask")
        self.mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.pixels = inputs.get("pixel_values")
        self.seen: dict[int, LayerReport] = {}
        self.entering: torch.Tensor | None = None
        self.lens_seconds = 0.0

    # ---- the two passes ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Measure filters and tokens."""
        start = time.perf_counter()
        hook = self._keep_entering()
        try:
            with observed(self.model, self.layers, self._see_filter, self._see_block):
                self._forward(self.inputs)
        except NotUnderstoodError as error:
            raise ValueError(f"{error}: the lens does not know such logits; choose other layers") from error
        finally:
            hook()
        total = time.perf_counter() - start
        unseen = [layer.name for layer in self.seen.values() if not layer.heads]
        if unseen:
            self._skip(f"{', '.join(unseen)}: no attention ran there on these inputs")
        self.report.layers = [self.seen[index] for index in sorted(self.seen) if self.seen[index].heads]
        if not self.report.layers:
            raise ValueError(f"no self-attention layer of {type(self.model).__name__} has run on these inputs")
        self.report.seconds = {"model": total - self.lens_seconds, "lens": self.lens_seconds}

    def look_at_noise(self) -> None:
        """Run clean and noisy samples side by side."""
        start = time.perf_counter()
        doubled = {
            name: torch.cat((value, value))
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == self.batch
            else value
            for name, value in self.inputs.items()
        }
        generator = torch.Generator().manual_seed(self.options.seed)
        with self._noise_in(doubled, generator), observed(self.model, self.layers, self._see_pair, self._see_pairs):
            self._forward(doubled)
        self.report.seconds["noise"] = time.perf_counter() - start
        for layer in self.report.layers:
            layer.noise = {place: value for place, value in layer.noise.items() if math.isfinite(value)}
            if not layer.noise:
                layer.alpha = layer.beta = layer.predicted_gain = None

    @contextmanager
    def _noise_in(self, inputs: dict[str, Any], generator: torch.Generator) -> Any:
        """Noise in the second half of the batch, in the images or in the embedded tokens."""

        def disturbed(x: torch.Tensor) -> torch.Tensor:
            clean = x[: self.batch]
            if not bool(clean.float().std() > 0):
                self._skip("what the noise does: the input is constant, and the noise is a share of its deviation")
            noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)
            return torch.cat((clean, clean + self.options.noise * clean.float().std().to(x.dtype) * noise))

        if isinstance(self.pixels, torch.Tensor):
            inputs["pixel_values"] = disturbed(inputs["pixel_values"])
            yield
            return
        if isinstance(inputs.get("inputs_embeds"), torch.Tensor):
            inputs["inputs_embeds"] = disturbed(inputs["inputs_embeds"])
            yield
            return
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        hook = embeddings.register_forward_hook(lambda module, args, output: disturbed(output))
        try:
            yield
        finally:
            hook.remove()

    def _forward(self, inputs: dict[str, Any]) -> None:
        # Without the head: its logits over a vocabulary would take more memory than all else.
        base = getattr(self.model, "base_model", self.model)
        accepted = inspect.signature(base.forward).parameters
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        base(**inputs, **extra)

    # ---- what is seen --------------------------------------------------------------------------------------------

    def _keep_entering(self) -> Any:
        """Keep what the first block is given, for the exact parts of its queries and keys."""
        layer = self.layers[0]
        if layer.place != 0:
            return lambda: None
        modules = dict(self.model.named_modules())
        from .observation import block_name, first_tensor

        block = modules.get(block_name(layer, modules))
        if block is None:
            return lambda: None

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.entering = first_tensor(args, kwargs)

        return block.register_forward_pre_hook(keep, with_kwargs=True).remove

    def _layer(self, index: int) -> LayerReport:
        layer = self.layers[index]
        if index not in self.seen:
            self.seen[index] = LayerReport(layer.name, layer.place, _kind(layer))
        return self.seen[index]

    def _see_filter(self, index: int, call: FilterCall, output: torch.Tensor) -> None:
        start = time.perf_counter()
        self._check(index, call, output)
        tokens = self._tokens(index, call)
        layer = self._layer(index)
        if not layer.heads:
            new_value = call.new_value
            layer.tokens["values"] = measure_tokens(side_by_side(new_value), tokens.real)
            layer.tokens["filtered"] = measure_tokens(side_by_side(output), tokens.real)
            noise = _method_noise(new_value, output, tokens.real)
            layer.heads = _head_reports(measure_heads(call, tokens), noise, self._learned(index))
            if self.options.measures == "all":
                self._add_pictures(call, tokens, layer, new_value[0] - output[0])
                self._add_shares(index, call, tokens, layer)
                self._add_spectra(call, tokens, layer)
        self.lens_seconds += time.perf_counter() - start

    def _add_pictures(self, call: FilterCall, tokens: Tokens, layer: LayerReport, removed: torch.Tensor) -> None:
        if call.query.shape[-2] <= LISTED_LENGTH:
            layer.method_noise_map = removed.double().norm(dim=-1).tolist()
            layer.maps = filter_maps(call, self.ids, tokens.real, self.report.token)

    def _see_block(self, index: int, block: BlockTokens) -> None:
        start = time.perf_counter()
        layer = self._layer(index)
        for place, x in block._asdict().items():
            if x.ndim == 3:
                layer.tokens[place] = measure_tokens(x, self._real(x.shape[0], x.shape[1]))
        self.lens_seconds += time.perf_counter() - start

    def _see_pair(self, index: int, call: FilterCall, output: torch.Tensor) -> None:
        for place, heads in (("values", call.new_value), ("filtered", output)):
            x = side_by_side(heads)
            self._layer(index).noise[place] = noise_ratio(x, self._real(x.shape[0] // 2, x.shape[1])).decibels

    def _see_pairs(self, index: int, block: BlockTokens) -> None:
        layer = self._layer(index)
        real = self._real(block.entering.shape[0] // 2, block.entering.shape[1])
        for place, x in block._asdict().items():
            layer.noise[place] = noise_ratio(x, real).decibels
        found = gains(block.entering, block.after_residual, real)
        layer.alpha, layer.beta, layer.predicted_gain = *found, found.predicted_decibels

    # ---- its parts -----------------------------------------------------------------------------------------------

    def _real(self, batch: int, length: int) -> torch.Tensor | None:
        return self.mask if self.mask is not None and tuple(self.mask.shape) == (batch, length) else None

    def _tokens(self, index: int, call: FilterCall) -> Tokens:
        """What is known of the tokens of a layer; the first layer's go into the report."""
        batch, _, length, _ = call.query.shape
        real = self._real(batch, length)
        if not isinstance(self.pixels, torch.Tensor):
            tokens = Tokens(real)
        else:
            grid = _grid(self.layers[index].module, self.pixels)
            special = -1 if grid is None else length - grid[0] * grid[1]
            if grid is None or not 0 <= special <= MAX_SPECIAL_TOKENS:
                special, grid = self.options.num_special_tokens or 0, None
                self._skip("distances and position bandwidths: the grid of patches is not known")
            elif self.options.num_special_tokens not in (None, special):
                raise ValueError(
                    f"num_special_tokens must be {special}, since {length} tokens are {grid[0]} x {grid[1]} patches "
                    f"and {special} more, got {self.options.num_special_tokens}"
                )
            tokens = Tokens(real, special, grid, has_places=grid is not None)
        if not self.report.length:
            self._describe(tokens, length)
        return tokens

    def _describe(self, tokens: Tokens, length: int) -> None:
        if length < 2:
            raise ValueError("inputs must have at least 2 tokens, got 1: a filter of one token returns it")
        chosen = self.options.token
        if chosen is not None and chosen >= length:
            raise ValueError(f"token must be below the number of tokens, {length}, got {chosen}")
        report = self.report
        report.length, report.axes, report.special = length, tokens.axes, tokens.special
        report.grid = None if tokens.grid is None else list(tokens.grid)
        report.token = _at_place(tokens, length, self.options.place) if chosen is None else chosen
        if length > LISTED_LENGTH:
            self._skip(f"maps and lists over tokens: {length} tokens are more than {LISTED_LENGTH}")

    def _check(self, index: int, call: FilterCall, output: torch.Tensor) -> None:
        """Refuse activations that are not finite."""
        real = self._real(call.query.shape[0], call.query.shape[-2])
        for name, x in (("query", call.query), ("key", call.key), ("value", call.value), ("output", output)):
            finite = x.isfinite().all(-1)
            if real is not None:
                finite = finite | ~real[:, None].to(x.device)
            if not bool(finite.all()):
                head = int((~finite).any(-1).any(0).nonzero()[0, 0])
                raise ValueError(
                    f"activations must be finite: the {name} of {self.layers[index].name} (layer "
                    f"{self.layers[index].place}), head {head}, has NaN or infinite numbers"
                )

    def _learned(self, index: int) -> list[dict[str, float]]:
        """What the layer's own filter holds, one dictionary a head."""
        if own_filter(self.layers[index].module) is None:
            return []
        rows = filter_summary(self.layers[index].module).rows
        return [
            {name: value for name, value in row.items() if name not in ("layer", "head") and isinstance(value, float)}
            for row in rows
        ]

    def _add_shares(self, index: int, call: FilterCall, tokens: Tokens, layer: LayerReport) -> None:
        types = self.ids if isinstance(self.ids, torch.Tensor) else None
        if types is not None and tuple(types.shape) != (call.query.shape[0], call.query.shape[-2]):
            types = None
        if call.query.shape[0] < 2:
            self._skip("kernel decomposition by mean effects: it needs at least 2 samples, got 1")
        else:
            shares = summed_up(decompose_by_means(call, types, tokens.real))
            for head in layer.heads:
                head.shares = {name: values[head.head] for name, values in shares.items()}
        if self.layers[index].place != 0 or self.entering is None or call.positions:
            return
        parts = first_layer_parts(self.model, self.layers[index], self.entering, call.query.shape[-2])
        if parts is None or any(
            (sum(held.values()) - x).norm() > EXACT_ERROR * x.norm()
            for held, x in zip(parts, (call.query, call.key), strict=True)
        ):
            return
        exact = variance_shares(call, *parts, tokens.real)
        for head in layer.heads:
            head.exact_shares = {name: values[head.head] for name, values in exact.items()}

    def _add_spectra(self, call: FilterCall, tokens: Tokens, layer: LayerReport) -> None:
        kind, length = self.options.spectra, call.query.shape[-2]
        if kind == "none":
            self._skip("spectra: they were not asked for")
        elif length <= DENSE_LENGTH:
            for head, matrix, operator in zip(layer.heads, *layer_matrices(call, tokens.real), strict=True):
                head.filter_spectrum = head.operator_spectrum = dense_spectrum(matrix)
                if call.is_boosted:
                    head.operator_spectrum = dense_spectrum(operator)
        elif kind == "dense":
            self._skip(
                f'spectra: {length} tokens are more than {DENSE_LENGTH} (spectra="iterative" finds the largest)'
            )
        elif tokens.real is not None and not bool(tokens.real[0].all()):
            self._skip("iterative spectra: the first sample has padding")
        else:
            for head in layer.heads:
                head.filter_spectrum = head.operator_spectrum = iterative_spectrum(call, head.head, boosted=False)
                if call.is_boosted:
                    head.operator_spectrum = iterative_spectrum(call, head.head, boosted=True)

    def _skip(self, reason: str) -> None:
        if reason not in self.report.skipped:
            self.report.skipped.append(reason)


def _kind(layer: AttentionLayer) -> str:
    kernel = own_filter(layer.module)
    if kernel is None:
        return "stock attention"
    spec = kernel.spec
    return f"{spec.content_kernel}, {spec.position_kernel}, boosting {spec.boosting}, feedback {spec.feedback}"


def _grid(module: nn.Module, pixels: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches of the given images."""
    patch = getattr(getattr(module, "config", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else patch
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or pixels.ndim != 4:
        return None
    return pixels.shape[-2] // int(sides[0]), pixels.shape[-1] // int(sides[1])


def _at_place(tokens: Tokens, length: int, place: tuple[float, float] | None) -> int:
    """The patch there; the one in the middle, or the middle of a text, without a place."""
    if tokens.grid is None:
        return length // 2
    across, down = (0.5, 0.5) if place is None else place
    row, column = (min(int(share * side), side - 1) for share, side in zip((down, across), tokens.grid, strict=True))
    return tokens.special + row * tokens.grid[1] + column


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
