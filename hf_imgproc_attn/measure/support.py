"""Which models of Transformers can have a filter, and in which modes, measured on tiny models.

    imgproc-attn support docs/supported-models.md

Each cell of the table is a check that ran: in float64, with weights so large that attention is far from uniform. What
cannot work has to be refused by the package, with the reason. All else that goes wrong is a fault.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import sdpa_mask

from ..errors import plain_message
from ..markdown_tables import table_lines
from ..models.any_filter import apply_filter, filtered_layers
from ..models.any_layers import attention_layers
from ..models.modeling_imgproc_filtered import own_auto_class
from .page_table import measured, write_table, written_reasons
from .support_models import (
    ARCHITECTURES,
    AUDIO,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    EXPERTS,
    IMAGES,
    OUTSIDE,
    build,
    inputs,
    output,
)

COMMAND = "imgproc-attn support docs/supported-models.md"
MARKS = ("<!-- supported: begin -->\n", "\n<!-- supported: end -->")
YES, NOTHING = "yes", "–"
TOLERANCE = 1e-12
"""Of the largest number of the output."""
_PLAIN = "imgproc_dense_reference"
_GROUPS = (
    ("decoders", DECODERS),
    ("encoders of texts", ENCODERS),
    ("encoder-decoders", ENCODER_DECODERS),
    ("audio", AUDIO),
    ("images", IMAGES),
    ("refused", OUTSIDE),
)


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


class Column(NamedTuple):
    """One column of the table.

    title: its head.
    has: whether an architecture has what the column is about, by its title.
    run: is called with the title; raises ValueError where the package refuses.
    meaning: what "yes" says, for below the table.
    """

    title: str
    has: Callable[[str], bool]
    run: Callable[[str], None]
    meaning: str


def measure(column: Column, title: str) -> str:
    """``"yes"``, ``"–"`` where the architecture has nothing of the kind, or the reason of a refusal.

    Raises:
        Exception: what is none of these: a fault.
    """
    if not column.has(title):
        return NOTHING
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of the libraries, about their own deprecated parts
            column.run(title)
    except ValueError as error:
        return plain_message(error)
    return YES


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
def _check_formula(title: str, padded: bool = False) -> None:
    given = inputs(title, padded)
    found = output(_filtered(title), given)
    plain: Any = build(title)
    use_dense_reference(plain)
    if torch.equal(output(plain, given), found):
        raise RuntimeError("the filter changes nothing")
    for layer in attention_layers(plain):
        layer.module.marked_for_twicing = True  # type: ignore[assignment]
    _require_same(found, output(plain, given), given)


def _check_padded(title: str) -> None:
    _check_formula(title, padded=True)


@torch.no_grad()
def _check_decoding(title: str, kind: str) -> None:
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
def _check_compiled(title: str) -> None:
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


def _check_checkpointed(title: str) -> None:
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


def _check_lora(title: str) -> None:
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
def _check_saved(title: str) -> None:
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


_CAUSAL = {*DECODERS, "Falcon", "Bloom", "MPT"}


def _any(title: str) -> bool:
    return True


def _sees_all(title: str) -> bool:
    return title not in _CAUSAL


def _decodes(title: str) -> bool:
    return title in _CAUSAL or title in ENCODER_DECODERS


def _is_text(title: str) -> bool:
    return title not in IMAGES and title not in ("Whisper", "SegFormer")


def _shares_keys(title: str) -> bool:
    fields = ARCHITECTURES[title][1]
    return "num_key_value_heads" in fields and fields["num_key_value_heads"] < fields["num_attention_heads"]


def _has_window(title: str) -> bool:
    return any(ARCHITECTURES[title][1].get(name) for name in ("sliding_window", "local_attention", "window_size"))


COLUMNS = (
    Column(
        "full", lambda title: title not in DECODERS, _check_formula, "attention to all tokens computes (2A − A²) V"
    ),
    Column("causal", _decodes, _check_formula, "likewise, where later tokens are hidden"),
    Column("padded", _is_text, _check_padded, "likewise, with padding: on the left for decoders, else on the right"),
    Column("grouped", _shares_keys, _check_formula, "likewise, where query heads share keys"),
    Column(
        "sliding",
        _has_window,
        _check_formula,
        "likewise, where a token sees a window",
    ),
    Column(
        "cached",
        _decodes,
        lambda title: _check_decoding(title, "dynamic"),
        "token by token with the model's own cache, the logits of the whole text at once",
    ),
    Column("static", _decodes, lambda title: _check_decoding(title, "static"), "likewise, with a cache of fixed size"),
    Column(
        "compiled",
        _any,
        _check_compiled,
        "the same under `torch.compile`: a decoder's step with a static cache is one graph, and so is every other "
        "model's pass, where it is without a filter",
    ),
    Column(
        "checkpointed",
        _any,
        _check_checkpointed,
        "the same gradients with gradient checkpointing (`use_reentrant=False`), gains included",
    ),
    Column(
        "LoRA", _any, _check_lora, "PEFT trains its adapter and the gains alone; merged, the model computes the same"
    ),
    Column("saved", _any, _check_saved, "`save_pretrained`, and an Auto class brings back the same class and output"),
)


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """The table, and below it the reasons of what is refused and what the columns mean.

    Args:
        outcomes: (title of an architecture, of a column) -> what :func:`measure` found.
    """
    reasons = [outcome for outcome in dict.fromkeys(outcomes.values()) if outcome not in (YES, NOTHING)]
    rows = []
    for group, titles in _GROUPS:
        rows.append([f"**{group}**"])
        for title in titles:
            found = (outcomes[title, column.title] for column in COLUMNS)
            cells = (each if each in (YES, NOTHING) else f"no ({1 + reasons.index(each)})" for each in found)
            rows.append([title, *cells])
    lines = table_lines(["", *(column.title for column in COLUMNS)], rows)
    lines += ["", *(f"({number}) `{reason}`\n" for number, reason in enumerate(reasons, start=1))]
    lines += [f"- {column.title}: {column.meaning}" for column in COLUMNS]
    return "\n".join(lines)


def summary(outcomes: dict[tuple[str, str], str]) -> str:
    """The table in a paragraph, as the README has it."""
    works = {
        title for title in ARCHITECTURES if all(outcomes[title, column.title] in (YES, NOTHING) for column in COLUMNS)
    }
    refused = [title for title in ARCHITECTURES if title not in works]
    modes = [column.title for column in COLUMNS]
    return (
        f"{len(works)} architectures work in all modes that they have ({', '.join(modes)}); refused, with the reason: "
        f"{', '.join(refused)}."
    )


def read_table(text: str) -> dict[tuple[str, str], str]:
    """What :func:`table` was made of."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    reason = written_reasons(text)
    return {
        (row[0], column.title): cell if cell in (YES, NOTHING) else reason(cell)
        for row in rows
        if row[0] in ARCHITECTURES
        for column, cell in zip(COLUMNS, row[1:], strict=True)
    }


def write(page: Path) -> None:
    """Measure all, and put the table between the two marks of a page; errors as of :func:`.page_table.write_table`."""
    columns = {column.title: column for column in COLUMNS}
    write_table(page, MARKS, lambda: table(measured(ARCHITECTURES, columns, measure)))
