"""BERT: the stock model where the filter is stock, and every preset that makes sense for it elsewhere."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertForMaskedLM,
    ImgProcBertForSequenceClassification,
    ImgProcBertForTokenClassification,
    ImgProcBertModel,
)
from hf_imgproc_attn.backbones import BERT
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.models.helpers import sharpen_
from tests.models.variants import IMPLEMENTATIONS, assert_same_gradients, gradients, pad, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 28,
    "max_position_embeddings": 24, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SUPPORTED = tuple(name for name in PRESETS if name not in BERT.refused_presets)
HEADS = (
    (ImgProcBertModel, BertModel),
    (ImgProcBertForMaskedLM, BertForMaskedLM),
    (ImgProcBertForSequenceClassification, BertForSequenceClassification),
    (ImgProcBertForTokenClassification, BertForTokenClassification),
)


def bert(preset: str = "softmax", kind: Any = ImgProcBertForMaskedLM, **overrides: Any) -> Any:
    """A tiny model with asymmetric weights that make its attention far from uniform, in float64."""
    config = ImgProcBertConfig.from_preset(preset, **{**SIZES, **overrides})
    model = sharpen_(kind(config)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("self.query.weight", "self.key.weight")):
                parameter *= 2**0.5
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("ours", "theirs"), HEADS, ids=lambda kind: kind.__name__)
def test_softmax_is_the_stock_model_to_the_bit(ours: Any, theirs: Any, implementation: str) -> None:
    model = bert(kind=ours, attn_implementation=implementation).float()
    stock = theirs(BertConfig(**SIZES, attn_implementation=implementation)).eval()
    stock.load_state_dict(model.state_dict())
    inputs = {**pad(token_ids(), 0, 6, "right"), "token_type_ids": torch.arange(9).expand(2, 9) // 5}
    inputs.pop("position_ids")
    wanted, got = stock(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
    assert torch.equal(got[0], wanted[0])
    assert all(map(torch.equal, got.hidden_states, wanted.hidden_states))
    if theirs is not BertModel:
        labels = torch.tensor([0, 2]) if "Sequence" in theirs.__name__ else torch.randint(0, 3, (2, 9))
        torch.testing.assert_close(model(**inputs, labels=labels).loss, stock(**inputs, labels=labels).loss)


@pytest.mark.parametrize("preset", SUPPORTED)
def test_eager_equals_sdpa_and_padding_is_not_seen(preset: str) -> None:
    inputs = pad(token_ids(), 0, 6, "right")
    results = []
    for implementation in IMPLEMENTATIONS:
        model = bert(preset, attn_implementation=implementation)
        logits = model(**inputs).logits
        seen = torch.cat((logits[0, :6], logits[1]))
        results.append((seen, gradients(model, (seen * torch.linspace(-1, 1, 61)).sum())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-10)
    assert_same_gradients(results[1][1], results[0][1], rtol=1e-6, atol=1e-8)
    alone = model(inputs["input_ids"][:1, :6]).logits[0]
    torch.testing.assert_close(results[1][0][:6], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("preset", SUPPORTED)
def test_words_on_both_sides_and_their_order_are_seen(preset: str) -> None:
    model, ids = bert(preset), token_ids(1)
    before = model(ids).logits
    changed = ids.clone()
    changed[0, -1] = 1 + changed[0, -1] % 50
    assert (model(changed).logits[0, 0] - before[0, 0]).abs().max() > 1e-6, "a later word"
    swapped = ids[:, [0, 2, 1, 4, 3, 5, 6, 8, 7]]
    assert (model(swapped).logits[0, 0] - before[0, 0]).abs().max() > 1e-6, "the order of the others"


@pytest.mark.parametrize("preset", BERT.refused_presets)
def test_a_preset_that_makes_no_sense_is_refused_with_the_reason(preset: str) -> None:
    with pytest.raises(Exception, match="'none' in every layer .* blind to|'forget' sums what the|'delta' corrects"):
        ImgProcBertConfig.from_preset(preset, **SIZES)
    mixed = ["none", "gaussian", "none"]
    assert ImgProcBertConfig(**SIZES, position_kernel=mixed).position_kernel == mixed


def test_the_table_refuses_what_the_configuration_refuses() -> None:
    for preset in SUPPORTED:
        ImgProcBertConfig.from_preset(preset, **SIZES)
    assert "nope" in BERT.refused_presets


@pytest.mark.parametrize(
    ("field", "value"),
    [("is_decoder", True), ("add_cross_attention", True), ("position_embedding_type", "relative_key")],
)
def test_another_architecture_is_refused(field: str, value: Any) -> None:
    with pytest.raises(Exception, match=f"{field} must be .*, got {value!r}"):
        ImgProcBertConfig(**SIZES, **{field: value})


@pytest.mark.parametrize("padding", [61, -62])
def test_padding_that_is_no_word_is_refused(padding: int) -> None:
    with pytest.raises(ValueError, match=f"pad_token_id must be None or one of the 61 words .*, got {padding}"):
        ImgProcBertModel(ImgProcBertConfig(**SIZES, pad_token_id=padding))


def test_the_attentions_are_the_operator_that_multiplies_v() -> None:
    ids = token_ids()
    plain = bert("softmax", ImgProcBertModel, num_hidden_layers=1, attn_implementation="eager")
    twiced = bert("twicing", ImgProcBertModel, num_hidden_layers=1, attn_implementation="eager")
    (a,), (operator,) = (model(ids, output_attentions=True).attentions for model in (plain, twiced))
    torch.testing.assert_close(operator, 2 * a - a @ a)
    assert a.std() > 0.1, "far from uniform"


@pytest.mark.parametrize(
    ("residual", "read", "skip"),
    [
        ("standard", lambda first, x: x, 1),
        ("twicing", lambda first, x: first - x, 1),
        ("sos", lambda first, x: first + x, -1),
        ("osher", lambda first, x: first + (first - x), 1),
    ],
    ids=["standard", "twicing", "sos", "osher"],
)
def test_a_layer_normalises_after_the_residual_scheme(residual: str, read: Any, skip: int) -> None:
    model = bert(kind=ImgProcBertModel, residual=residual)
    hidden = model(token_ids(), output_hidden_states=True).hidden_states
    layer = model.encoder.layer[1]
    attention, after = layer.attention.self, layer.attention.output
    heads = torch.nn.functional.scaled_dot_product_attention(*attention.project(read(hidden[0], hidden[1])))
    middle = after.LayerNorm(skip * hidden[1] + after.dense(heads.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(layer.feed_forward_chunk(middle), hidden[2])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds, got neither"),
        ({"input_ids": torch.ones(1, 25).long()}, "25 tokens .* max_position_embeddings=24"),
        ({"input_ids": torch.ones(1, 4).long(), "position_ids": torch.tensor([[0, 1, 2, 24]])}, "from 0 to .* = 23"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(1, 4).long(), "encoder_hidden_states": torch.ones(1, 4, 20)}, "must be None"),
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert()(**inputs)


@pytest.mark.parametrize("preset", ["twicing", "bilateral_gaussian", "rope"])
def test_half_the_sizes_sum_to_the_whole_batch(preset: str) -> None:
    """The loss that Trainer sums over the batches before a step."""
    ids = token_ids(4)
    for kind, labels in (
        (ImgProcBertForMaskedLM, ids.masked_fill(torch.arange(4)[:, None] > torch.arange(9), -100)),
        (ImgProcBertForTokenClassification, (ids % 3).masked_fill(torch.arange(4)[:, None] > torch.arange(9), -100)),
        (ImgProcBertForSequenceClassification, torch.tensor([0, 1, 2, 1])),
    ):
        model = bert(preset, kind)
        count = (labels != -100).sum()
        parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in ([0], [1, 2, 3])]
        torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    ids, found = token_ids(), []
    for checkpointing in (False, True):
        model = bert("pidformer", position_kernel="untied").train()
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        found.append(gradients(model, model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss))
    assert_same_gradients(*found)


def test_lora_without_targets_adapts_the_attention_and_not_the_filter() -> None:
    model = get_peft_model(bert("gradient_boosted", position_kernel="untied"), LoraConfig(r=2))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    layers = range(SIZES["num_hidden_layers"])
    prefix = "base_model.model.bert.encoder.layer"
    assert adapted == {f"{prefix}.{i}.attention.self.{part}" for i in layers for part in ("query", "value")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mean_pooling_reads_all_tokens_but_padding(dtype: torch.dtype, tmp_path: Path) -> None:
    model = bert("twicing", ImgProcBertForSequenceClassification, classifier_pooling="mean").to(dtype)
    inputs = pad(token_ids(), 0, 6, "right")
    inputs.pop("position_ids")
    output = model.bert(**inputs)
    for row, length in ((0, 6), (1, 9)):
        mean = output.last_hidden_state[row, :length].double().mean(0).to(dtype)
        wanted = torch.tanh(model.bert.pooler.dense(mean))
        torch.testing.assert_close(output.pooler_output[row], wanted)
    alone = model(inputs["input_ids"][:1, :6]).logits[0]
    torch.testing.assert_close(model(**inputs).logits[0], alone)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.classifier_pooling == "mean"
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="attention_mask must have shape .* with classifier_pooling='mean'"):
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def test_another_pooling_is_refused() -> None:
    assert ImgProcBertConfig(**SIZES).classifier_pooling == "cls"
    with pytest.raises(Exception, match="classifier_pooling"):
        ImgProcBertConfig(**SIZES, classifier_pooling="max")


def test_the_summary_of_the_filters() -> None:
    summary = bert("bilateral_gaussian").filter_summary()
    assert len(summary.rows) == 15
    assert {"layer", "head", "h_y", "h_p"} <= summary.rows[0].keys()
    assert summary.learned == ["h_p", "h_y"]


def _without_the_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    """The modelling file that was saved beside a checkpoint, imported from there."""
    name = f"saved_{folder.name}"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module(f"{name}.modeling_imgproc_bert")


@pytest.mark.parametrize("preset", SUPPORTED)
def test_every_preset_is_saved_and_loaded_and_its_code_is_complete(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = bert(preset, ImgProcBertForSequenceClassification), token_ids()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", *(head.auto_class for head in BERT.heads)}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is ImgProcBertForSequenceClassification
    wanted = model(ids).logits
    torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-12, atol=1e-13)
    code = _without_the_package(monkeypatch, tmp_path)
    alien = code.ImgProcBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert not type(alien).__module__.startswith("hf_imgproc_attn")
    torch.testing.assert_close(alien(ids).logits, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("preset", ["softmax", "bilateral", "rope"])
def test_a_checkpoint_of_another_variant_is_refused(preset: str, tmp_path: Path) -> None:
    bert(preset).save_pretrained(tmp_path)
    other = {"softmax": "rope", "bilateral": "softmax", "rope": "softmax"}[preset]
    config = ImgProcBertConfig.from_preset(other, **SIZES)
    with pytest.raises(ValueError, match="another variant"):
        ImgProcBertForMaskedLM.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("preset", SUPPORTED)
def test_a_few_steps_lower_the_loss(preset: str) -> None:
    torch.manual_seed(0)
    model = ImgProcBertForMaskedLM(ImgProcBertConfig.from_preset(preset, **SIZES)).train()
    ids = token_ids(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids.masked_fill(torch.arange(9) % 3 == 1, 1), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_the_auto_class_knows_the_masked_language_model(tmp_path: Path) -> None:
    bert("twicing").save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is ImgProcBertForMaskedLM


MIXED: dict[str, Any] = {
    "position_kernel": ["untied", "gaussian", "none"],
    "boosting": ["none", "twicing", "learned"],
    "learn_bandwidths": True,
}
"""Layers of every kind in one model."""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64_and_keeps_its_scalars(dtype: torch.dtype, implementation: str) -> None:
    half = bert(**MIXED, attn_implementation=implementation).to(dtype)
    truth = bert(**MIXED, attn_implementation="eager")
    truth.load_state_dict(half.state_dict())
    inputs = pad(token_ids(), 0, 6, "right")
    seen = inputs["attention_mask"].bool()
    got, wanted = (model(**inputs).logits[seen].double() for model in (half, truth))
    assert (got - wanted).norm() / wanted.norm() < (0.05 if dtype == torch.bfloat16 else 0.008)
    found = {name: value.dtype for name, value in half.named_parameters()}
    assert {kind for name, kind in found.items() if "scalar_bias" in name} == {torch.float32}
    assert {kind for name, kind in found.items() if "scalar_bias" not in name} == {dtype}
    single = bert(**MIXED).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = single(**inputs).logits[seen].float()
    assert (mixed - single(**inputs).logits[seen]).norm() / wanted.norm() < 0.05


def test_a_compiled_model_gives_the_same() -> None:
    """In one graph, forward and backward, every kind of layer."""
    torch._dynamo.reset()
    model, inputs = bert(**MIXED), pad(token_ids(), 0, 6, "right")
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        logits = run(**inputs).logits[inputs["attention_mask"].bool()]
        found.append((logits, gradients(model, logits.log_softmax(-1)[..., 0].mean())))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-7, atol=1e-9)


def test_gradients_by_torch_func_are_those_of_autograd() -> None:
    model, ids = bert(**MIXED), token_ids()
    own = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss

    wanted = gradients(model, model(ids, labels=ids).loss)
    assert_same_gradients(torch.func.grad(loss)({name: value.detach() for name, value in own.items()}), wanted)


def test_device_map_auto(tmp_path: Path) -> None:
    model, ids = bert(**MIXED), token_ids()
    model.save_pretrained(tmp_path)
    loaded = ImgProcBertForMaskedLM.from_pretrained(tmp_path, device_map="auto", dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-13)
