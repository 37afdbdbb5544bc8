"""What every preset works with, measured on tiny models: graphs, ways of tuning, odd batches.

    imgproc-attn compatibility docs/compatibility.md

A check runs for one preset and compares what it gets with what the model computes by itself. What cannot work has to
be refused by the package, with the reason; that is what the table then shows. All else that goes wrong is a fault.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from ..errors import plain_message
from ..markdown_tables import table_lines
from ..models.configuration_imgproc_bert import ImgProcBertConfig
from ..models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from ..models.configuration_imgproc_vit import ImgProcViTConfig
from ..models.modeling_imgproc_bert import ImgProcBertForSequenceClassification
from ..models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from ..models.modeling_imgproc_vit import ImgProcViTForImageClassification, ImgProcViTForMaskedImageModeling
from ..models.modeling_shared import SUPPORTED_IMPLEMENTATIONS
from ..models.spec_fields import PRESETS
from .page_table import measured, write_table, written_reasons

COMMAND = "imgproc-attn compatibility docs/compatibility.md"
MARKS = ("<!-- measured: begin -->\n", "\n<!-- measured: end -->")
YES = "yes"
LARGEST_GRADIENT = 10.0
"""So many times that of every other parameter the first gradient of the mask token may be."""

_VOCABULARY, _POSITIONS, _SIDE, _PATCH = 13, 24, 12, 4
_GPT2 = {
    "vocab_size": _VOCABULARY, "n_positions": _POSITIONS, "n_embd": 8, "n_head": 2, "n_layer": 2, "bos_token_id": 0,
    "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_BERT = {
    "vocab_size": _VOCABULARY, "max_position_embeddings": _POSITIONS, "hidden_size": 8, "num_attention_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 8, "num_labels": 3,
}  # fmt: skip
_VIT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "image_size": _SIDE,
    "patch_size": _PATCH, "encoder_stride": _PATCH, "num_channels": 1, "num_labels": 3,
}  # fmt: skip
# By kind, not by name: the names of backbones stand in their table alone.
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "decoder": (ImgProcGPT2LMHeadModel, ImgProcGPT2Config, _GPT2),
    "images": (ImgProcViTForImageClassification, ImgProcViTConfig, _VIT),
    "encoder": (ImgProcBertForSequenceClassification, ImgProcBertConfig, _BERT),
}


class Check(NamedTuple):
    """One column of the table.

    key: short name.
    title: the head of the column.
    run: is called with the name of a preset; raises ValueError where the package refuses.
    meaning: what "yes" says, for below the table.
    """

    key: str
    title: str
    run: Callable[[str], None]
    meaning: str


def measure(check: Check, preset: str) -> str:
    """``"yes"``, or the reason for which the package refuses.

    Raises:
        Exception: what is neither: a fault.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of the libraries, about their own deprecated parts
            check.run(preset)
    except (ValueError, StrictDataclassError) as error:
        return plain_message(error)
    return YES


def build(preset: str, backbone: str, **fields: Any) -> Any:
    """A tiny model of a preset in evaluation mode, with weights that matter; ``backbone`` is a key of ``_MODELS``."""
    torch.manual_seed(0)
    model_class, config_class, sizes = _MODELS[backbone]
    model = model_class(config_class.from_preset(preset, **sizes, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual initial weights make every row of A uniform, which hides what a wrong graph does to it.
            parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.eval()


def inputs_of(backbone: str, batch: int, length: int = 7) -> dict[str, torch.Tensor]:
    """Random tokens ``[batch, length]`` of which the last row is padded, or images."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    if backbone == "images":
        return {"pixel_values": torch.randn(batch, 1, _SIDE, _SIDE, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.long)
    hidden = slice(2) if backbone == "decoder" else slice(-2, None)
    mask[-1:, hidden] = 0
    return {
        "input_ids": torch.randint(1, _VOCABULARY, (batch, length), generator=generator),
        "attention_mask": mask,
    }


def check_export(preset: str, backbone: str) -> None:
    """``torch.export`` with dynamic sizes: right at sizes that it has not seen, and made of core operators."""
    model, given = build(preset, backbone), inputs_of(backbone, 3)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1000)}
    if backbone != "images":
        sizes[1] = torch.export.Dim("length", min=3, max=_POSITIONS)
    options: dict[str, Any] = {"use_cache": False} if backbone == "decoder" else {}
    shapes = {**dict.fromkeys(given, sizes), **dict.fromkeys(options)}
    exported = torch.export.export(model, (), {**given, **options}, dynamic_shapes=shapes, strict=False)
    run = exported.module()
    with torch.no_grad():
        for other in (inputs_of(backbone, 1, 17), inputs_of(backbone, 5, 4)):
            shown = other["attention_mask"].bool() if backbone == "decoder" else slice(None)
            got, wanted = (call(**other, **options).logits[shown] for call in (run, model))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    check_operators(exported)


def check_operators(exported: Any) -> None:
    """Refuse a graph with operators that runtimes for exported graphs need not have.

    They know torch's core ATen operators; fused attention is kept whole, as torch's own ONNX exporter does.
    """
    fused = torch.ops.aten.scaled_dot_product_attention.default
    table = torch.export.default_decompositions()
    table.pop(fused, None)
    nodes = exported.run_decompositions(table).graph.nodes
    targets = {node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)}
    # Left away by those that read a graph: it computes nothing.
    allowed = {fused, torch.ops.aten._assert_tensor_metadata.default}
    strange = sorted(str(target) for target in targets - allowed if torch.Tag.core not in target.tags)
    if strange:
        raise ValueError(f"the exported graph has operators that are not in the core set: {', '.join(strange)}")


def check_peft(preset: str, backbone: str, method: str) -> None:
    """A method of PEFT: two steps move its parameters and no other, it is saved and loaded, and text is generated."""
    import peft

    config: Any = {
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ia3": lambda: peft.IA3Config(task_type={"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS"}.get(backbone)),
    }[method]()
    given = inputs_of(backbone, 2)
    labels = given["input_ids"] if backbone == "decoder" else torch.tensor([0, 2])
    base = build(preset, backbone)
    frozen = {name: value.detach().clone() for name, value in base.named_parameters()}
    tuned = peft.get_peft_model(base, config).eval()
    own = {name: value for name, value in tuned.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(**given, labels=labels).loss.backward()
        _require(all(value.grad is not None and value.grad.abs().max() > 0 for value in own.values()), "no gradient")
        optimizer.step()
    kept = {
        re.sub(r"\.(base_layer|original_module)\b", "", name).removeprefix("base_model.").removeprefix("model."): value
        for name, value in tuned.named_parameters()
    }
    for name, value in frozen.items():
        _require(torch.equal(kept[name], value), f"{name} was trained")
    with torch.no_grad():
        logits = tuned(**given).logits
        with tempfile.TemporaryDirectory() as folder:
            tuned.save_pretrained(folder)
            again = peft.PeftModel.from_pretrained(build(preset, backbone), folder).eval()
        torch.testing.assert_close(again(**given).logits, logits)
        if backbone == "decoder":
            _check_generation(tuned)


def _check_generation(tuned: Any) -> None:
    """Greedy generation with the cache gives what the whole text gives at each step."""
    ids = inputs_of("decoder", 2)["input_ids"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(3):
        logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].clone()
        logits[:, 0] = -torch.inf  # the end of the text, which min_new_tokens forbids
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    _require(torch.equal(found, ids), "generation with the cache differs from that without")


def check_empty(preset: str, backbone: str) -> None:
    """A batch of no rows: forward, backward and, of a decoder, one step with the cache."""
    for implementation in SUPPORTED_IMPLEMENTATIONS:
        model, given = build(preset, backbone, attn_implementation=implementation), inputs_of(backbone, 0)
        output = model(**given)
        wanted = (0, 7, _VOCABULARY) if backbone == "decoder" else (0, 3)
        _require(output.logits.shape == wanted, f"logits of shape {tuple(output.logits.shape)}")
        output.logits.sum().backward()
        if backbone == "decoder":
            step = model(inputs_of("decoder", 0, 1)["input_ids"], past_key_values=output.past_key_values)
            _require(step.logits.shape == (0, 1, _VOCABULARY), f"logits of shape {tuple(step.logits.shape)}")


def check_mask_token(preset: str) -> None:
    """The mask token of a new model for masked images: its first gradient is none that plain SGD would explode on."""
    torch.manual_seed(0)
    model: Any = ImgProcViTForMaskedImageModeling(ImgProcViTConfig.from_preset(preset, **_VIT))
    masked = torch.zeros(2, (_SIDE // _PATCH) ** 2, dtype=torch.bool)
    masked[:, ::2] = True
    model(**inputs_of("images", 2), bool_masked_pos=masked).loss.backward()
    sizes = {name: float(value.grad.abs().max()) for name, value in model.named_parameters() if value.grad is not None}
    own = sizes.pop("vit.embeddings.mask_token")
    ratio = own / max(sizes.values())
    if not 0 < ratio < LARGEST_GRADIENT:
        raise ValueError(f"the first gradient of the mask token is {ratio:.3g} times the largest of all others")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(problem)


def _bound(function: Callable[..., None], *rest: str) -> Callable[[str], None]:
    return lambda preset: function(preset, *rest)


_SIZES = "right at other sizes than it was exported with, and made of torch's core operators and fused attention"
_TUNED = "two steps train the adapter alone, and it is saved and loaded"
CHECKS = (
    Check(
        "export gpt2",
        "`torch.export`, GPT-2",
        _bound(check_export, "decoder"),
        f"one graph for every batch and length, with padding: {_SIZES}",
    ),
    Check("export vit", "`torch.export`, ViT", _bound(check_export, "images"), f"one graph for every batch: {_SIZES}"),
    Check(
        "prefix", "prefix tuning", _bound(check_peft, "decoder", "prefix"), f"PEFT, GPT-2: {_TUNED}; text is generated"
    ),
    Check("prompt", "prompt tuning", _bound(check_peft, "decoder", "prompt"), "likewise"),
    Check("ia3 gpt2", "IA3, GPT-2", _bound(check_peft, "decoder", "ia3"), "likewise, with PEFT's default targets"),
    Check("ia3 bert", "IA3, BERT", _bound(check_peft, "encoder", "ia3"), f"{_TUNED}, with default targets"),
    Check("ia3 vit", "IA3, ViT", _bound(check_peft, "images", "ia3"), "likewise"),
    Check(
        "empty gpt2",
        "no rows, GPT-2",
        _bound(check_empty, "decoder"),
        "a batch of 0 texts goes forward, backward and through a step of decoding",
    ),
    Check("empty bert", "no rows, BERT", _bound(check_empty, "encoder"), "likewise, but for decoding"),
    Check("empty vit", "no rows, ViT", _bound(check_empty, "images"), "a batch of 0 images goes forward and backward"),
    Check(
        "mask token",
        "mask token",
        check_mask_token,
        "masked image modelling: its first gradient is of the size of the others, so that plain SGD can train it",
    ),
)


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """The table, and below it the reasons of what is refused and what the columns mean.

    Args:
        outcomes: (preset, key of a check) -> what :func:`measure` found.
    """
    reasons = list(dict.fromkeys(outcome for outcome in outcomes.values() if outcome != YES))
    rows = []
    for preset in PRESETS:
        found = (outcomes[preset, check.key] for check in CHECKS)
        cells = (YES if outcome == YES else f"refused ({1 + reasons.index(outcome)})" for outcome in found)
        rows.append([f"`{preset}`", *cells])
    lines = table_lines(["", *(check.title for check in CHECKS)], rows)
    lines += ["", *(f"({number}) `{reason}`\n" for number, reason in enumerate(reasons, start=1))]
    lines += [f"- {check.title}: {check.meaning}" for check in CHECKS]
    return "\n".join(lines)


def read_table(text: str) -> dict[tuple[str, str], str]:
    """What :func:`table` was made of."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    reason = written_reasons(text)
    return {
        (row[0].strip("`"), check.key): YES if cell == YES else reason(cell)
        for row in rows
        for check, cell in zip(CHECKS, row[1:], strict=True)
    }


def write(page: Path) -> None:
    """Measure all, and put the table between the two marks of a page; errors as of :func:`.page_table.write_table`."""
    columns = {check.key: check for check in CHECKS}
    write_table(page, MARKS, lambda: table(measured(PRESETS, columns, measure)))
