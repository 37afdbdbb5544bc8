"""Run a model under the lens: one forward pass for the filters, one more for the noise."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models.any_layers import AttentionLayer, described
from ..models.backend_call import FilterCall
from .given import cannot_be_called, chosen_layers, is_decoder, named_inputs
from .heads import Tokens
from .layer_measures import (
    add_exact_shares,
    add_heads,
    add_pictures,
    add_shares,
    add_spectra,
    check_finite,
    chosen_token,
    kind_of,
    tokens_of,
)
from .maps import small_picture
from .missing import missing_numbers
from .observation import BlockTokens, NotUnderstoodError, block_name, first_tensor, in_evaluation, observed
from .options import LISTED_LENGTH, LensOptions, lens_options
from .report import LayerReport, Report
from .tokens import gains, measure_tokens, noise_ratio, side_by_side


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
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
            ``[batch, channels, height, width]``. Two samples or more let position and content be told apart. None: 16
            samples of real data that is there, as the command shows (``data`` and ``labels`` are those of it).
        name: of the model, for the report.
        data: what the inputs are, in words.
        labels: the first sample's tokens as text.
        options: see :class:`LensOptions`.
        **given: fields of :class:`LensOptions`, by name.

    Raises:
        TypeError: for an option that there is not.
        ValueError: for a model without such layers, one with several stacks of which none is chosen, inputs that
            do not fit it, a single token, or activations that are not finite (layer and head are named).
    """
    options = lens_options(given) if options is None else options
    if inputs is None:
        inputs, data, labels = _real_data(model)
    layers = chosen_layers(model, options)
    named = named_inputs(model, inputs, layers)
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


def _real_data(model: nn.Module) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    from .inputs import show  # imports every backbone

    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model, which is loaded already, got {described(model)}")
    place = getattr(getattr(model, "config", None), "name_or_path", "") or f"this {type(model).__name__}"
    with in_evaluation(model):  # a model may have to write its texts itself
        shown = show(model, place)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in shown.inputs.items()}, shown.described, shown.labels


class _Run:
    """One look at one model."""

    report: Report

    def __init__(
        self, model: nn.Module, layers: list[AttentionLayer], inputs: dict[str, Any], options: LensOptions
    ) -> None:
        self.model, self.layers, self.inputs, self.options = model, layers, inputs, options
        main = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim > 0)
        side = "decoder_" if is_decoder(layers) and "decoder_input_ids" in inputs else ""
        self.batch = main.shape[0]
        self.ids = inputs.get(f"{side}input_ids")
        mask = inputs.get(f"{side}attention_mask")
        self.mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.pixels = inputs.get("pixel_values")
        self.seen: dict[int, LayerReport] = {}
        self.entering: torch.Tensor | None = None
        self.lens_seconds = 0.0
        self.is_looking = False

    # ---- the two passes ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Measure filters and tokens."""
        start = time.perf_counter()
        hook = self._keep_entering()
        try:
            see = self._own(self._see_filter), self._own(self._see_block)
            with observed(self.model, self.layers, *see):
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
        for reason in missing_numbers(self.report):
            self._skip(reason)
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
        see = self._own(self._see_pair), self._own(self._see_pairs)
        with self._noise_in(doubled, generator), observed(self.model, self.layers, *see):
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
        try:
            base(**inputs, **extra)
        except (NotUnderstoodError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.is_looking:  # what the lens itself does wrong keeps its traceback
                raise
            raise cannot_be_called(self.model, inputs, error) from error

    def _own(self, see: Callable[..., None]) -> Callable[..., None]:
        """A look that is timed, and whose errors are told from the model's."""

        def timed(*seen: Any) -> None:
            start = time.perf_counter()
            self.is_looking = True
            see(*seen)
            self.is_looking = False
            self.lens_seconds += time.perf_counter() - start

        return timed

    # ---- what is seen --------------------------------------------------------------------------------------------

    def _keep_entering(self) -> Any:
        """Keep what the first block is given, for the exact parts of its queries and keys."""
        layer = self.layers[0]
        if layer.place != 0:
            return lambda: None
        modules = dict(self.model.named_modules())
        block = modules.get(block_name(layer, modules))
        if block is None:
            return lambda: None

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.entering = first_tensor(args, kwargs)

        return block.register_forward_pre_hook(keep, with_kwargs=True).remove

    def _layer(self, index: int) -> LayerReport:
        layer = self.layers[index]
        if index not in self.seen:
            self.seen[index] = LayerReport(layer.name, layer.place, kind_of(layer))
        return self.seen[index]

    def _see_filter(self, index: int, call: FilterCall, output: torch.Tensor) -> None:
        check_finite(self.layers[index], call, output, self._real(call.query.shape[0], call.query.shape[-2]))
        tokens = self._tokens(index, call)
        layer = self._layer(index)
        if layer.heads:
            return
        place, ids = self.layers[index], self.ids
        add_heads(place.module, call, output, tokens, layer)
        if self.options.measures == "all":
            add_pictures(call, output, ids, tokens, self.report.token, layer)
            add_shares(call, ids, tokens, layer, self._skip)
            add_exact_shares(self.model, place, call, self.entering, tokens, layer)
            add_spectra(call, tokens, layer, self.options.spectra, self._skip)

    def _see_block(self, index: int, block: BlockTokens) -> None:
        layer = self._layer(index)
        for place, x in block._asdict().items():
            if x.ndim == 3:
                layer.tokens[place] = measure_tokens(x, self._real(x.shape[0], x.shape[1]))

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
        real, module = self._real(batch, length), self.layers[index].module
        tokens = tokens_of(module, (batch, length), (self.ids, self.pixels), real, self.options, self._skip)
        if not self.report.length:
            self._describe(tokens, length)
        return tokens

    def _describe(self, tokens: Tokens, length: int) -> None:
        report = self.report
        report.token = chosen_token(tokens, length, self.options)
        report.length, report.axes, report.special = length, tokens.axes, tokens.special
        report.grid = None if tokens.grid is None else list(tokens.grid)
        if length > LISTED_LENGTH:
            self._skip(f"maps and lists over tokens: {length} tokens are more than {LISTED_LENGTH}")
        single = 0 if tokens.real is None else int((tokens.real.sum(-1) == 1).sum())
        if single:
            self._skip(
                f"how alike tokens are in {single} of {self.batch} samples: a single real token has no other that it "
                "could be compared with"
            )

    def _skip(self, reason: str) -> None:
        if reason not in self.report.skipped:
            self.report.skipped.append(reason)
