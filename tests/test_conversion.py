"""Conversion of stock checkpoints: every tensor accounted for, initialised as the framework says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_imgproc_attn import PRESETS, ConversionReport, convert
from hf_imgproc_attn.backbones import of_config
from hf_imgproc_attn.conversion import convert_checkpoint
from tests.conversion_cases import GPT2, STOCK, VIT, disturbed, make_stock, outputs

KEEPING = {
    "learned_twicing": ("scalar_bias.boosting_gain", 3),
    "neutreno": ("scalar_bias.feedback_gains", 2),
    "pidformer": ("scalar_bias.feedback_gains", 2),
    "gradient_boosted": (".filter.gradient_boosting.", 3),
    "inversion": ("scalar_bias.inversion_gains", 3),
    "dynamic_inversion": (".filter.token_gains.", 3),
    "local_linear": (".filter.weight_booster.", 3),
    "gated": (".filter.gate.", 3),
    "value_residual": ("scalar_bias.value_residual", 2),
    "differential": (".filter.", 3),
    "delta": (".filter.", 3),
}
"""Presets that start as the source's function: what is new in them, and in how many of three layers."""


def is_refused(stock: PreTrainedModel, preset: str) -> bool:
    return preset in of_config(stock.config).refused_presets


@pytest.mark.sampled("preset,classes")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("classes", [STOCK[:4], STOCK[4:]], ids=["gpt2", "vit"])
def test_every_tensor_is_accounted_for(classes: list, number: int, preset: str, tmp_path: Path) -> None:
    """mapped + new = the tensors of the variant; used + unused = those of the source; the saved folder loads back."""
    stock = make_stock(*classes[number % len(classes)])
    if is_refused(stock, preset):
        with pytest.raises(Exception, match="'sinkhorn' scales|'forget' sums|'delta' corrects"):
            convert(stock, preset)
        return
    stock.save_pretrained(tmp_path / "stock")
    model, report = convert(tmp_path / "stock", preset, return_report=True)
    assert isinstance(report, ConversionReport)
    assert sorted([*report.mapped, *report.new]) == sorted(model.state_dict())
    used = {name for made_of in report.mapped.values() for name in made_of}
    assert used.isdisjoint(report.unused)
    # Of a table whose class position alone is used the other rows are listed.
    whole = {name.removesuffix(" (rows of the patches)") for name in report.unused}
    assert used | whole == set(stock.state_dict())
    assert not model.training
    model.save_pretrained(tmp_path / "variant")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "variant")), outputs(model))
    if preset == "softmax":
        assert torch.equal(outputs(model), outputs(stock))
        # Not 0: products of a memory-mapped and of a copied weight may differ in the last bit.
        assert report.max_difference < 1e-6
        assert report.unused == report.new == []
    elif preset in KEEPING:
        # It starts as the stock model; where no fused attention can be called, to the rounding of another kernel.
        assert report.max_difference < (2e-6 if preset == "local_linear" else 1e-6)
        assert report.unused == []
        kind, layers = KEEPING[preset]
        assert all(kind in name for name in report.new)
        assert len({name.split(kind)[0] for name in report.new}) == layers
    else:
        assert report.max_difference > 0.0
    assert bool(report.warnings) == (preset == "boosted_residual")
    if preset in ("twicing", "sos", "elliptical", "boosted_residual"):
        assert report.unused == report.new == []
    if preset in ("bilateral_gaussian", "nlm", "alibi", "t5_bias", "rope", "nope"):
        of_patches = "embeddings.position_embeddings (rows of the patches)"
        expected = "wpe.weight" if "gpt2" in stock.config.model_type else of_patches
        assert [name.removeprefix("transformer.").removeprefix("vit.") for name in report.unused] == [expected]
    if preset == "t5_bias":
        kinds = {name.rsplit(".", 1)[-1] for name in report.new}
        assert kinds == (
            {"relative_buckets"} if "gpt2" in stock.config.model_type else {"relative_buckets", "class_token"}
        )
    if preset in ("rope", "nope"):
        assert report.new == []


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
@pytest.mark.parametrize("scheme", ["twicing", "sos", "osher"])
def test_another_residual_scheme_is_warned_of(
    scheme: str, stock_spec: tuple, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence in the report and in the log, with presets and with overrides."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_imgproc_attn"), "propagate", True)
    stock = make_stock(*stock_spec)
    _, report = convert(stock, "twicing", return_report=True, residual=scheme)
    assert len(report.warnings) == 1
    assert f"the residual scheme {scheme!r} changes the function of the checkpoint" in report.warnings[0]
    assert f"warning: {report.warnings[0]}" in str(report)
    assert report.warnings[0] in caplog.text
    caplog.clear()
    _, report = convert(stock, "twicing", return_report=True)
    assert report.warnings == []
    assert "residual scheme" not in caplog.text


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", KEEPING)
@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_the_function_is_kept_and_what_is_new_learns(stock_spec: tuple, preset: str, implementation: str) -> None:
    stock = make_stock(*stock_spec)
    if is_refused(stock, preset):
        return
    stock.set_attn_implementation(implementation)
    model = convert(stock, preset)
    torch.testing.assert_close(outputs(model), outputs(stock), rtol=1e-5, atol=1e-5)
    outputs(model).square().sum().backward()
    zeros = (
        "boosting_gain",
        "feedback_gains",
        "value_residual",
        "token_gains.weight",
        "gate.projection.weight",
        "slope.weight",
        "scalar_bias.differential",
        "scalar_bias.delta",
        "token_rates.weight",
    )
    starts = [p for name, p in model.named_parameters() if name.endswith((*zeros, "inversion_gains"))]
    assert bool(starts) == (preset != "gradient_boosted")
    assert all(parameter.grad.abs().min() > 0 for parameter in starts)
    assert preset == "inversion" or not any(parameter.any() for parameter in starts)


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_further_rounds_keep_the_function(stock_spec: tuple) -> None:
    """Of a stock checkpoint, and of one that is gradient-boosted; other keys and values do not, and that is said."""
    stock = make_stock(*stock_spec)
    source = convert(stock, "gradient_boosted", boosting_steps=3, gradient_boosting_source="input")
    torch.testing.assert_close(outputs(source), outputs(stock), rtol=1e-5, atol=1e-5)
    disturbed(source)
    more, report = convert(source, "gradient_boosted", return_report=True, boosting_steps=5, boosted_layers=[0, 1, 2])
    torch.testing.assert_close(outputs(more), outputs(source), rtol=1e-5, atol=1e-5)
    assert more.config.gradient_boosting_source == "input"
    assert (report.warnings, report.kept) == ([], {"gradient_boosting_source": "input"})
    assert "(gradient_boosted, 5 rounds)" in str(report)
    other, report = convert(source, "gradient_boosted", return_report=True, gradient_boosting_source="residual")
    assert (outputs(other) - outputs(source)).abs().max() > 1e-3
    assert len(report.warnings) == 1
    assert "gradient_boosting_source='residual' changes the function" in report.warnings[0]
    fewer, report = convert(source, "gradient_boosted", return_report=True, boosting_steps=2)
    assert (outputs(fewer) - outputs(source)).abs().max() > 1e-3
    assert "24 trained tensors of the source's filter have no place" in report.warnings[0]


def test_given_factors_are_used_as_they_are() -> None:
    stock = make_stock(*STOCK[1])
    for fields, learned, strength in (
        ({"neutreno_lambda": 0.3}, False, 0.3),
        ({"neutreno_lambda": 0.3, "learn_feedback": True}, True, 0.3),
        ({"learn_feedback": True}, True, 0.0),
        ({"learn_feedback": False}, False, None),
    ):
        config = convert(stock, "neutreno", **fields).config
        assert (config.learn_feedback, config.neutreno_lambda) == (learned, strength)
    assert convert(stock, "pidformer").config.pid_gains == [0.0, 0.0, 0.0]
    assert convert(stock, "pidformer", pid_gains=[1, 0, 0]).config.learn_feedback is False


def test_untied_positions_start_from_the_content_projections() -> None:
    """GPT-2: LayerNorm from ln_1, U_Q and U_K from the halves of c_attn; bandwidths at the stock scaling."""
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2)
    model = convert(stock, "bilateral")
    for source, target in zip(stock.transformer.h, model.transformer.h, strict=True):
        projection = target.attn.filter.position_projection
        x = torch.randn(7, 32)
        expected = torch.nn.functional.linear(source.ln_1(x), source.attn.c_attn.weight.T)
        pair = projection(x.unsqueeze(0))
        joined = torch.cat([half.transpose(1, 2).flatten(2) for half in pair.chunk(2, dim=-1)], dim=-1)
        torch.testing.assert_close(joined[0], expected[:, :64], rtol=1e-5, atol=1e-5)
        scale = 2 * torch.exp(-2 * target.attn.filter.scalar_bias.content_log_bandwidth)
        torch.testing.assert_close(scale, torch.full((4,), 8**-0.5))


def test_vit_class_position_goes_into_the_class_token() -> None:
    """The table of patches loses its class entry to the class token, for untied and for Gaussian positions."""
    stock = make_stock(ViTForImageClassification, ViTConfig, VIT)
    positions, token = stock.vit.embeddings.position_embeddings, stock.vit.embeddings.cls_token
    for preset in ("bilateral", "bilateral_gaussian", "alibi", "t5_bias", "rope", "nope"):
        embeddings = convert(stock, preset).vit.embeddings
        assert torch.equal(embeddings.cls_token, token + positions[:, :1])
        if preset == "bilateral":
            assert torch.equal(embeddings.position_embeddings, positions[:, 1:])
        else:
            assert embeddings.position_embeddings is None


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_shared_projections_start_from_layer_0(stock_spec: tuple) -> None:
    stock = make_stock(*stock_spec)
    model, report = convert(stock, "bilateral", return_report=True, share_position_projections=True)
    names = [name for name in report.mapped if "position_projection" in name]
    assert len(names) == 4
    assert all(".0." in source for name in names for source in report.mapped[name])
    assert torch.equal(
        model.base_model.position_projection.norm.weight,
        (
            stock.base_model.h[0].ln_1
            if hasattr(stock.base_model, "h")
            else stock.base_model.layers[0].layernorm_before
        ).weight,
    )


def test_untied_conversion_keeps_position_information() -> None:
    """Content and position terms of the converted logits are those of the stock logits, cross terms dropped."""
    stock = make_stock(GPT2Model, GPT2Config, {**GPT2, "n_layer": 1})
    model = convert(stock, "bilateral")
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 61, (1, 9))
    attention = model(ids, output_attentions=True).attentions[0]
    block, positions = stock.h[0], stock.wpe(torch.arange(9))
    content = block.ln_1(stock.wte(ids))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, 9, 4, 8).transpose(1, 2)

    query, key, _ = block.attn.c_attn(content).split(32, dim=-1)
    weight = block.attn.c_attn.weight
    position_query, position_key = (block.ln_1(positions)[None] @ weight[:, part : part + 32] for part in (0, 32))
    logits = heads(query) @ heads(key).mT + heads(position_query) @ heads(position_key).mT
    logits = (logits * 8**-0.5).masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf"))
    torch.testing.assert_close(attention, logits.softmax(-1), rtol=1e-4, atol=1e-5)


def test_dtype_and_overrides_are_kept() -> None:
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2).to(torch.bfloat16)
    model = convert(stock, "bilateral_twicing", boosted_layers=[-1], resid_pdrop=0.3)
    assert model.dtype == torch.bfloat16
    assert model.config.boosted_layers == [-1]
    assert model.config.resid_pdrop == 0.3
    assert model.transformer.h[0].attn.filter.scalar_bias.content_log_bandwidth.dtype == torch.float32


def test_deit_published_as_vit_keeps_its_labels(tmp_path: Path) -> None:
    """DeiT checkpoints without a distillation token are ViT checkpoints by their config.json."""
    fields = {**VIT, "id2label": {i: f"class {i}" for i in range(5)}}
    make_stock(ViTForImageClassification, ViTConfig, fields).save_pretrained(tmp_path)
    assert convert(tmp_path, "twicing").config.id2label[3] == "class 3"


WITHOUT_TABLE = [
    name for name, fields in PRESETS.items() if fields.get("position_kernel", "additive") not in ("additive", "untied")
]


@pytest.mark.sampled
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_there_and_back(stock_spec: tuple, preset: str, tmp_path: Path) -> None:
    """Where the variant has all that stock attention needs it gives the stock model; else it is refused by name."""
    stock = make_stock(*stock_spec)
    if is_refused(stock, preset):
        return
    convert(stock, preset).save_pretrained(tmp_path)
    if preset in WITHOUT_TABLE:
        with pytest.raises(ValueError, match="position_kernel='additive' needs a table of positions, .* 'none'"):
            convert(tmp_path, "softmax")
        return
    model, report = convert(tmp_path, "softmax", return_report=True)
    torch.testing.assert_close(outputs(model), outputs(stock), rtol=1e-5, atol=1e-5)
    learned = {"neutreno": "neutreno_lambda=0.0", "pidformer": "pid_gains=[0.0, 0.0, 0.0]"}.get(preset)
    assert report.source_preset == (f"{preset} with {learned}, learn_feedback=True" if learned else preset)
    assert f"{report.source_preset} -> softmax" in str(report)
    dropped = [name for name in report.unused if ".filter." in name or "position_projection" in name]
    assert bool(dropped) == any("have no place in softmax" in warning for warning in report.warnings)
    assert bool(dropped) == (preset in {*KEEPING, "bilateral", "bilateral_twicing", "tupe", "sink", "qk_norm"})
    assert not any(".filter." in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("bilateral", {}), ("bilateral_twicing", {"boosting_steps": 1}), True),
        (("bilateral_twicing", {}), ("bilateral", {}), False),
        (("bilateral_gaussian", {}), ("bilateral_gaussian", {"boosting": "learned"}), True),
        (("rope", {"rotary_base": 50.0}), ("rope", {"boosting": "learned"}), True),
        (("t5_bias", {}), ("t5_bias", {"boosting": "gradient_boosted"}), True),
        (("tupe", {}), ("bilateral", {}), True),
        (("twicing", {"boosted_layers": [0, 2]}), ("learned_twicing", {}), True),
        (("sos", {"boosting_steps": 2}), ("learned_twicing", {}), True),
        (("learned_twicing", {}), ("learned_twicing", {"position_kernel": "untied"}), False),
        (("twicing", {"boosting_steps": 3, "boosted_layers": [-1]}), ("twicing", {}), True),
        (("twicing", {}), ("neutreno", {"boosting": "twicing"}), True),
        (("neutreno", {"learn_feedback": True}), ("neutreno", {"boosting": "learned"}), True),
        (("neutreno", {"neutreno_lambda": 0.3}), ("neutreno", {"learn_feedback": True}), True),
        (("boosted_residual", {}), ("boosted_residual", {"boosting": "learned"}), True),
        (("alibi", {}), ("nope", {}), False),
        (("gradient_boosted", {}), ("gradient_boosted", {"boosting_steps": 3}), True),
        (("gradient_boosted", {"gradient_boosting_source": "input"}), ("gradient_boosted", {}), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_variant_to_variant(stock_spec: tuple, first: tuple, second: tuple, same: bool) -> None:
    """What was trained stays where it means the same; what is new starts where the function is kept."""
    source = disturbed(convert(make_stock(*stock_spec), first[0], **first[1]))
    model, report = convert(source, second[0], return_report=True, **second[1])
    if same:
        torch.testing.assert_close(outputs(model), outputs(source), rtol=1e-4, atol=1e-4)
    else:
        assert (outputs(model) - outputs(source)).abs().max() > 1e-3
    before, after = source.state_dict(), model.state_dict()
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]) or "embeddings." in name, name
    assert sorted([*report.mapped, *report.new]) == sorted(after)
    if first[0] == second[0]:
        assert report.kept.items() <= source.config.to_dict().items()
        assert set(first[1]) - set(second[1]) <= set(report.kept)
        assert bool(report.kept) == ("kept of the source" in str(report))


def test_a_bandwidth_in_other_units_starts_anew() -> None:
    """h_p of ``untied`` measures vectors, that of ``gaussian`` places."""
    source = disturbed(convert(make_stock(*STOCK[1]), "bilateral"))
    model, report = convert(source, "bilateral_gaussian", return_report=True)
    fresh = convert(make_stock(*STOCK[1]), "bilateral_gaussian")
    for layer in range(3):
        scalars, old, new = (each.transformer.h[layer].attn.filter.scalar_bias for each in (model, source, fresh))
        assert torch.equal(scalars.position_log_bandwidth, new.position_log_bandwidth)
        assert torch.equal(scalars.content_log_bandwidth, old.content_log_bandwidth)
        assert f"transformer.h.{layer}.attn.filter.scalar_bias.position_log_bandwidth" in report.new


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_one_pair_of_projections_is_not_made_of_many(stock_spec: tuple) -> None:
    source = convert(make_stock(*stock_spec), "bilateral")
    with pytest.raises(ValueError, match="share_position_projections=True needs one pair .*projections=False"):
        convert(source, "tupe")


def test_another_residual_scheme_than_the_variants_is_warned_of() -> None:
    source = convert(make_stock(*STOCK[1]), "boosted_residual")
    _, report = convert(source, "softmax", return_report=True)
    assert "'standard' changes the function of the checkpoint, which was trained with 'twicing'" in report.warnings[0]


def test_bad_input_is_refused_before_work(tmp_path: Path) -> None:
    stock = make_stock(*STOCK[1])
    with pytest.raises(ValueError, match="preset must be one of softmax, .*, got 'bilatral'"):
        convert(stock, "bilatral")
    message = "n_positions=64 would change the shape of transformer.wpe.weight .* only the checkpoint's n_positions=48"
    with pytest.raises(ValueError, match=message):
        convert(stock, "twicing", n_positions=64)
    for name, value, allowed in (("n_layer", 2, 3), ("n_layer", 4, 3), ("num_hidden_layers", 4, 3), ("n_head", 2, 4)):
        with pytest.raises(ValueError, match=f"{name} must be the checkpoint's {allowed}, .*, got {value}"):
            convert(stock, "twicing", **{name: value})
    stock.save_pretrained(tmp_path / "stock")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    del weights["transformer.h.1.ln_2.weight"]
    save_file(weights, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks tensors of GPT2LMHeadModel: transformer.h.1.ln_2.weight"):
        convert(tmp_path / "stock", "twicing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        convert_checkpoint(str(tmp_path / "stock"), "twicing", str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("own", [False, True])
def test_a_checkpoint_with_other_shapes_than_its_configuration_says_is_refused(own: bool, tmp_path: Path) -> None:
    """The library raises a RuntimeError, which a command line would show as a traceback."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    stock = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
    (convert(stock, "twicing") if own else stock).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 13}))
    with pytest.raises(ValueError, match="have other shapes than its config.json says"):
        convert(str(tmp_path), "sos")
