"""Filters in other people's models: equal to a dense formula, to our own classes, and gone without a trace."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

import hf_imgproc_attn.measure.support_checks  # noqa: F401  # registers the dense formula as an attention function
from hf_imgproc_attn import (
    PRESETS,
    ImgProcGPT2Config,
    ImgProcGPT2LMHeadModel,
    ImgProcViTConfig,
    ImgProcViTModel,
    apply_filter,
    filtered_layers,
    remove_filter,
)
from hf_imgproc_attn.measure.support_checks import use_dense_reference
from hf_imgproc_attn.models.any_filter import stack_names
from hf_imgproc_attn.models.any_layer import AppliedFilter
from hf_imgproc_attn.models.any_layers import attention_layers
from tests.any_model.architectures import EVERYTHING, IMAGE, build, inputs, output, text

STACKS = {
    "bart": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "gemma3": {"model.layers": 4},
    "swin": {"encoder.layers": 3},
}
"""What is not one stack of three layers."""


def exact(name: str) -> Any:
    """A stock model whose attention is in float64: the eager one of Transformers is in single precision.

    And whose logits have their soft cap, which Transformers 5.17 leaves out of its fused attention.
    """
    model = build(name)
    if not model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None):
        use_dense_reference(model)
    return model


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_architecture_computes_the_formula(name: str) -> None:
    model, given = exact(name), inputs(name, padded=True)
    stock = output(model, given)
    assert stack_names(model) == STACKS.get(name, {next(iter(stack_names(model))): 3})
    apply_filter(model, "twicing")
    filtered = output(model, given)
    remove_filter(model)
    assert torch.equal(output(model, given), stock)

    for layer in attention_layers(model):
        layer.module.marked_for_twicing = True  # type: ignore[assignment]
    use_dense_reference(model)
    mask = given.get("attention_mask")
    visible = mask.bool() if mask is not None and mask.shape == stock.shape[:2] else ...
    scale = stock.abs().max()
    assert (filtered - stock)[visible].abs().max() > 1e-6 * scale
    assert (filtered - output(model, given))[visible].abs().max() < 1e-12 * scale


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_learned_gain_starts_where_the_model_is_and_is_trained(name: str) -> None:
    model, given = exact(name), inputs(name)
    stock = output(model, given)
    apply_filter(model, "learned_twicing")
    gains = {key: value for key, value in model.named_parameters() if "imgproc_filter" in key}
    assert len(gains) == len(filtered_layers(model))
    assert all(key.endswith("imgproc_filter.filter.scalar_bias.boosting_gain") for key in gains)
    result = output(model, given)
    assert (result - stock).abs().max() <= 1e-12 * stock.abs().max()
    result.square().sum().backward()
    assert all(gain.grad is not None and bool((gain.grad != 0).all()) for gain in gains.values())


OWN: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in ("twicing", "sos", "learned_twicing", "elliptical", "alibi", "t5_bias")},
    "neutreno": {"preset": "neutreno", "neutreno_lambda": 0.3},
    "pidformer": {"preset": "pidformer", "pid_gains": [0.5, 0.1, 0.2]},
    "value_residual": {"preset": "value_residual"},
    "gaussian": {
        "content_kernel": "gaussian",
        "position_kernel": "gaussian",
        "learn_bandwidths": True,
        "boosting": "twicing",
        "boosting_steps": 3,
    },
    "bandwidths": {"content_bandwidth": [1.0, 2.0, 3.0, 4.0], "boosting": "diffusion"},
}


@pytest.mark.parametrize("which", OWN)
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_what_a_foreign_model_gets_is_what_our_own_class_computes(name: str, which: str) -> None:
    stock, given = build(name), inputs(name, padded=True)
    fields = dict(OWN[which])
    fields = {**PRESETS[fields.pop("preset", "softmax")], **fields}
    with torch.no_grad():
        if "position_kernel" in fields:  # our own class then has no table of positions
            table = stock.transformer.wpe.weight if name == "gpt2" else stock.embeddings.position_embeddings  # type: ignore[union-attr]
            table.zero_()  # type: ignore[operator]
    model_class, config_class = (
        (ImgProcGPT2LMHeadModel, ImgProcGPT2Config) if name == "gpt2" else (ImgProcViTModel, ImgProcViTConfig)
    )
    own = model_class(config_class(**EVERYTHING[name][1], **fields)).double().eval()  # type: ignore[operator]
    missing, _ = own.load_state_dict(stock.state_dict(), strict=False)
    assert all("scalar_bias" in key for key in missing)
    apply_filter(stock, **fields)

    scalars = {key: value for key, value in own.named_parameters() if "scalar_bias" in key}
    foreign = {key: value for key, value in stock.named_parameters() if "scalar_bias" in key}
    assert len(scalars) == len(foreign)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for mine, theirs in zip(scalars.values(), foreign.values(), strict=True):
            mine.add_(0.3 * torch.rand(mine.shape, generator=generator, dtype=mine.dtype))
            theirs.copy_(mine)
    results = [output(model, given) for model in (own, stock)]
    visible = given["attention_mask"].bool() if "attention_mask" in given else ...
    assert (results[0] - results[1])[visible].abs().max() < 1e-12 * results[0].abs().max()
    for result in results:
        result[visible].square().sum().backward()
    for mine, theirs in zip(scalars.values(), foreign.values(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad - theirs.grad).abs().max() <= 1e-11 * mine.grad.abs().max()


@pytest.mark.parametrize("which", ["twicing", "sos", "elliptical", "neutreno", "value_residual", "bandwidths"])
def test_dropout_in_training_is_that_of_our_own_class(which: str) -> None:
    """One mask on A for all passes of a booster, and none outside training."""
    dropout = {"attn_pdrop": 0.4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    stock, given = build("gpt2", **dropout), inputs("gpt2", padded=True)
    fields = dict(OWN[which])
    fields = {**PRESETS[fields.pop("preset", "softmax")], **fields}
    own = ImgProcGPT2LMHeadModel(ImgProcGPT2Config(**{**EVERYTHING["gpt2"][1], **dropout}, **fields)).double()
    own.load_state_dict(stock.state_dict(), strict=False)
    apply_filter(stock, **fields)
    with torch.no_grad():
        for key, value in (*own.named_parameters(), *stock.named_parameters()):
            if "value_residual" in key:
                value.fill_(0.3)
    results = []
    for model in (own, stock):
        torch.manual_seed(0)
        results.append(output(model.train(), given))
    visible = given["attention_mask"].bool()
    assert (results[0] - results[1])[visible].abs().max() < 1e-12 * results[0].abs().max()
    calm = output(stock.eval(), given)
    assert (calm - results[1])[visible].abs().max() > 1e-3 * calm.abs().max()
    assert torch.equal(output(stock, given), calm)


@pytest.mark.parametrize(
    ("preset", "learned"),
    [("neutreno", "feedback_gains"), ("pidformer", "feedback_gains"), ("value_residual", "value_residual")],
)
def test_feedback_that_is_learned_starts_where_the_model_is(preset: str, learned: str) -> None:
    """At 0, and with a gradient; it has no bounds, as a gain below 0 or above 1 means something too."""
    model = build("llama")
    stock = output(model, inputs("llama"))
    apply_filter(model, preset)
    result = output(model, inputs("llama"))
    assert torch.equal(result, stock)
    result.square().sum().backward()
    gains = [parameter for key, parameter in model.named_parameters() if learned in key]
    assert gains
    assert all(gain.grad is not None and bool(gain.grad.any()) for gain in gains)
    with torch.no_grad():
        for gain in gains:
            gain.fill_(-0.5)
        below = output(model, inputs("llama"))
        for gain in gains:
            gain.fill_(1.5)
        assert (output(model, inputs("llama")) - below).abs().max() > 1e-4
        assert below.isfinite().all()


def test_values_of_layers_that_differ_are_not_mixed() -> None:
    """Gemma 3n and others share keys and values among some layers only: shapes tell."""
    model = apply_filter(build("llama"), "value_residual")
    last = model.model.layers[-1].self_attn.imgproc_filter  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"mixes values of two layers: .* has values of shape \(2, 1, 5, 4\)"):
        last._check_first_value(torch.zeros(2, 2, 5, 4), torch.zeros(2, 1, 5, 4))


def test_layers_count_from_either_end_of_a_chosen_stack() -> None:
    model = build("bart")
    apply_filter(model, "twicing", layers=[-1], stacks="model.decoder.layers")
    (row,) = filtered_layers(model)
    assert (row["stack"], row["layer"]) == ("model.decoder.layers", 1)
    assert str(filtered_layers(model)).splitlines()[1].split()[:2] == ["model.decoder.layers", "1"]
    assert str(filtered_layers(remove_filter(model))) == "no layer is filtered"


def test_layers_without_a_filter_run_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = apply_filter(build("llama"), "twicing", layers=[1])
    seen = []

    def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return sdpa_attention.sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", stock)
    output(model, inputs("llama"))
    assert seen == [model.model.layers[0].self_attn, model.model.layers[2].self_attn]  # type: ignore[union-attr,index]


def everything_of(model: nn.Module) -> dict[str, Any]:
    """What runs when a model does: modules, hooks, configurations and what lies on a module beside its parameters."""
    return {
        name: (
            type(module),
            type(module).forward,
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            id(getattr(module, "config", None)),
            sorted(key for key in vars(module) if not key.startswith("_")),
        )
        for name, module in model.named_modules()
    }


def test_layers_without_a_filter_cost_nothing() -> None:
    """Neither before a filter, nor beside one, nor after it, is anything of them another thing."""
    model = build("llama")
    before, implementation = everything_of(model), model.config._attn_implementation  # type: ignore[union-attr]
    apply_filter(model, "twicing", layers=[-1])
    beside = everything_of(model)
    changed = {name for name in beside if beside[name] != before.get(name)}
    assert changed
    assert all(name.startswith("model.layers.2.self_attn") for name in changed)
    remove_filter(model)
    assert everything_of(model) == before
    assert model.config._attn_implementation == implementation == "sdpa"  # type: ignore[union-attr]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_model_may_have_either_implementation(implementation: str, padded: bool) -> None:
    given = inputs("llama", padded)
    wanted = output(apply_filter(build("llama"), "twicing"), given)
    model = build("llama")
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    apply_filter(model, "twicing")
    visible = given["attention_mask"].bool() if padded else ...
    assert (output(model, given) - wanted)[visible].abs().max() < 1e-12


@pytest.mark.parametrize("which", ["twicing", "neutreno", "elliptical"])
def test_gradient_checkpointing_changes_no_gradient(which: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = apply_filter(build("llama"), **OWN[which]).train()
        if checkpointing:
            with warnings.catch_warnings():  # newer versions of Transformers have another name for it
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model(text(), labels=text(), use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_a_copy_of_a_filtered_model_is_one() -> None:
    model = apply_filter(build("llama"), "pidformer", pid_gains=[0.5, 0.1, 0.2])
    twin, given = copy.deepcopy(model), inputs("llama")
    assert torch.equal(output(twin, given), output(model, given))
    remove_filter(twin)
    assert not torch.equal(output(twin, given), output(model, given))
    assert len(filtered_layers(model)) == 3


def test_half_precision_keeps_the_scalars_in_single() -> None:
    model = apply_filter(build("llama"), "learned_twicing").bfloat16()
    kinds = {parameter.dtype for key, parameter in model.named_parameters() if "scalar_bias" in key}
    assert kinds == {torch.float32}
    assert output(model, inputs("llama")).isfinite().all()


def test_each_stack_has_places_of_its_own_kind() -> None:
    """Patches have two axes and texts one, in one model as in each alone; its tables of positions are told apart."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=4)  # 64 patches, and 77 places of words
    both = CLIPConfig(text_config={**sizes, "vocab_size": 50}, vision_config=vision.to_dict())
    torch.manual_seed(0)
    model = CLIPModel(both).eval()
    alone = CLIPVisionModel(vision).eval()
    alone.load_state_dict(
        {name.removeprefix("vision_model."): x for name, x in model.vision_model.state_dict().items()}
    )
    pixels = torch.randn(2, 3, 32, 32)
    wanted = apply_filter(alone, "alibi", boosting="twicing")(pixels).last_hidden_state
    apply_filter(model, "alibi", boosting="twicing")
    assert torch.equal(model.vision_model(pixel_values=pixels).last_hidden_state, wanted)
    axes = {name.partition(".")[0]: len(part.sides) for name, part in model.named_modules() if hasattr(part, "sides")}
    assert axes == {"text_model": 1, "vision_model": 2}


def test_a_decoder_of_texts_behind_an_encoder_of_images() -> None:
    encoder = ViTModel(ViTConfig(**IMAGE)).eval()
    decoder = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=9, is_decoder=True, add_cross_attention=True)
    )
    model = apply_filter(VisionEncoderDecoderModel(encoder=encoder, decoder=decoder), "alibi")
    axes = {name.partition(".")[0]: len(part.sides) for name, part in model.named_modules() if hasattr(part, "sides")}
    assert axes == {"encoder": 2, "decoder": 1}


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "t5", "swin"])
def test_the_width_of_a_head_is_that_of_its_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the factor of ``cosine`` and the smallest bandwidth of places are made."""
    forward, seen = AppliedFilter.forward, set()

    def look(self: AppliedFilter, seat: Any, projected: Any, *rest: Any, **options: Any) -> Any:
        seen.add((self.filter.head_dim, projected[0].shape[-1]))
        return forward(self, seat, projected, *rest, **options)

    monkeypatch.setattr(AppliedFilter, "forward", look)
    with torch.no_grad():
        apply_filter(build(name), "exclusive")(**inputs(name))
    assert seen
    assert all(known == width for known, width in seen), seen
