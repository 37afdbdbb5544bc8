"""What the table of supported models checks in each of its cells; :mod:`.support` has the table.

Each check is called with an architecture's title. It raises ValueError where the package refuses, and another error
where something is wrong.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import sdpa_mask

from ..models.any_filter import apply_filter, filtered_layers
from ..models.any_layers import attention_layers
from ..models.modeling_imgproc_filtered import own_auto_class
from .support_models import (
    ARCHITECTURES,
    AUDIO,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    EXPERTS,
    IMAGES,
    build,
    inputs,
    output,
)

TOLERANCE = 1e-12
"""Of the largest number of the output."""
_PLAIN = "imgproc_dense_reference"


def dense_twicing(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(2A - A²) V in layers that are marked, A V in others: an attention function that is nothing but the formula.

    Arguments are those of Transformers' own functions.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    if position_bias is not None:
        logits = logits + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        logits = logits + attention_mask
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)), dim=-1)
    matrix = logits.softmax(-1).nan_to_num(0.0)[..., : key.shape[-2]]
    matrix = 2 * matrix - matrix @ matrix if getattr(module, "marked_for_twicing", False) else matrix
    return (matrix @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_PLAIN, dense_twicing)
AttentionMaskInterface.register(_PLAIN, sdpa_mask)


def use_dense_reference(model: Any) -> None:
    """Let every attention of a model be :func:`dense_twicing`."""
    model.set_attn_implementation(_PLAIN)
    for module in model.modules():  # Transformers 5.17 leaves out parts with a configuration of their own
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation = _PLAIN


def _filtered(title: str, preset: str = "twicing") -> Any:
    model = apply_filter(build(title), preset)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scalar_bias" in name:
                parameter.add_(0.3)
    return model


def _require_same(
    found: torch.Tensor, wanted: torch.Tensor, given: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    mask = given.get("attention_mask")
    # Padding on the left sees nothing; what is computed there is nobody's.
    shown = mask.bool() if mask is not None and mask.shape == found.shape[:2] else ...
    error = (found - wanted)[shown].abs().max() / wanted[shown].abs().max()
    if not error < tolerance:
        raise RuntimeError(f"differs by {error:.1e}")


@torch.no_grad()
def check_formula(title: str, padded: bool = False) -> None:
    """The model with filters against the stock one whose layers compute the formula."""
    given = inputs(title, padded)
    found = output(_filtered(title), given)
    plain: Any = build(title)
    use_dense_reference(plain)
    if torch.equal(output(plain, given), found):
        raise RuntimeError("the filter changes nothing")
    for layer in attention_layers(plain):
        layer.module.marked_for_twicing = True  # type: ignore[assignment]
    _require_same(found, output(plain, given), given)


def check_padded(title: str) -> None:
    """:func:`check_formula` with padding."""
    check_formula(title, padded=True)


@torch.no_grad()
def check_decoding(title: str, kind: str) -> None:
    """A prompt of seven tokens and then one at a time, against the whole text at once."""
    model, given = _filtered(title), inputs(title)
    wanted = output(model, given, use_cache=False)
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    name, rest = "input_ids", {}
    if title in ENCODER_DECODERS:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        name = "decoder_input_ids"
        encoded = {key: value for key, value in given.items() if key != name}
        rest = {"encoder_outputs": model.get_encoder()(**encoded)}
    pieces = given[name].split([7] + [1] * 7, dim=1)
    found = [output(model, {name: piece}, past_key_values=cache, use_cache=True, **rest) for piece in pieces]
    _require_same(torch.cat(found, dim=1), wanted, {})


@torch.no_grad()
def check_compiled(title: str) -> None:
    """A decoder's step with a static cache, or the pass of another model: one graph where the stock model's is one."""
    model, given = _filtered(title), inputs(title)
    options = {} if title in (*IMAGES, *AUDIO, *ENCODERS) else {"use_cache": False}
    tolerance = TOLERANCE
    if EXPERTS in ARCHITECTURES[title][1]:
        model.float().set_experts_implementation("grouped_mm")
        tolerance = 1e-5
    wanted = output(model, given, **options)
    try:
        found = _compiled(model, title, given, options, is_one_graph=True)
    except torch._dynamo.exc.TorchDynamoException:
        try:
            _compiled(build(title), title, given, options, is_one_graph=True)
        except torch._dynamo.exc.TorchDynamoException:
            found = _compiled(model, title, given, options, is_one_graph=False)
        else:
            raise
    _require_same(found, wanted[:, 7:11] if title in DECODERS else wanted, {}, tolerance)


def _compiled(
    model: Any, title: str, given: dict[str, torch.Tensor], options: dict[str, Any], is_one_graph: bool
) -> torch.Tensor:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=is_one_graph)
    if title not in DECODERS:
        return output(compiled, given, **options)
    cache, ids = StaticCache(config=model.config, max_cache_len=20), given["input_ids"]
    model(ids[:, :7], past_key_values=cache, use_cache=True)
    steps = [compiled(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(7, 11)]
    return torch.cat(steps, dim=1)


def _gradients(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of dropout
    output(model, given).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def check_checkpointed(title: str) -> None:
    """Gradients of a training step, with and without gradient checkpointing."""
    given, found = inputs(title), []
    for checkpointing in (False, True):
        model = _filtered(title, "learned_twicing").train()
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(_gradients(model, given))
    plain, checked = found
    if plain.keys() != checked.keys() or not any("boosting_gain" in name for name in plain):
        raise RuntimeError("other parameters have gradients")
    for name, gradient in plain.items():
        if not (checked[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max():
            raise RuntimeError(f"the gradient of {name} differs")


def check_lora(title: str) -> None:
    """One step trains adapter and gains; the merged model computes what the adapted one did."""
    import peft

    given = inputs(title)
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["imgproc_filter"])
    model: Any = peft.get_peft_model(_filtered(title, "learned_twicing"), config).eval()
    before = output(model, given).detach()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not any("boosting_gain" in name for name in trained) or not all(
        "lora" in name or "imgproc_filter" in name for name in trained
    ):
        raise RuntimeError("other parameters are trained")
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    output(model, given).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = output(model, given)
        if torch.equal(before, after):
            raise RuntimeError("a step changes nothing")
        _require_same(output(model.merge_and_unload(), given), after, {})


@torch.no_grad()
def check_saved(title: str) -> None:
    """Saved, and loaded through the Auto class that knows the model's class.

    What comes back is compared with the stock model after it was saved and loaded, with the same filter: some models
    keep numbers beside their parameters, which loading makes anew.
    """
    model, stock, given = _filtered(title, "learned_twicing"), build(title), inputs(title)
    auto_class = own_auto_class(stock.config, (type(stock),)) or ""
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(f"{folder}/stock")  # type: ignore[operator]
        model.save_pretrained(f"{folder}/filtered")
        wanted = apply_filter(type(stock).from_pretrained(f"{folder}/stock"), "learned_twicing")  # type: ignore[attr-defined]
        found = getattr(transformers, auto_class).from_pretrained(f"{folder}/filtered")
    wanted.load_state_dict(model.state_dict())
    if type(found) is not type(model) or filtered_layers(found) != filtered_layers(model):
        raise RuntimeError(f"came back as {type(found).__name__} with {filtered_layers(found)}")
    if EXPERTS in ARCHITECTURES[title][1]:
        for each in (wanted, found):
            each.set_experts_implementation("eager")  # type: ignore[operator]
    _require_same(output(found, given), output(wanted, given), {})
