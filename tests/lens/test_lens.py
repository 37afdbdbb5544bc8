"""The lens on whole models: what it sees is what the model computes, and the model is left as it was."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

import hf_imgproc_attn
from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.lens import LensOptions, Report, inspect_model
from hf_imgproc_attn.lens.observation import BlockTokens, observed
from hf_imgproc_attn.lens.spectrum import Spectrum
from hf_imgproc_attn.models.any_layers import attention_layers
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import filter_logits, filter_matrix
from hf_imgproc_attn.models.configuration_imgproc_bert import ImgProcBertConfig
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.modeling_imgproc_bert import ImgProcBertModel
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.any_model.architectures import build, inputs, text
from tests.models.helpers import sharpen_, tiny_gpt2_config, tiny_vit_config
from tests.models.variants import images, pad, token_ids

STACKS = {"bart": "model.decoder.layers", "t5": "encoder.block", "whisper": "model.encoder.layers"}


def ours(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    kind, preset = name.split(":")
    if kind == "gpt2":
        config = tiny_gpt2_config(preset, attn_implementation="eager")
        model: nn.Module = hf_imgproc_attn.ImgProcGPT2LMHeadModel(config)
        given = pad(token_ids(3, 12), 1, 8, "left")
    else:
        config = tiny_vit_config(preset, attn_implementation="eager")
        model = hf_imgproc_attn.ImgProcViTForImageClassification(config)
        given = {"pixel_values": images().double()}
    return sharpen_(model.double().eval()), given


def stock(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return build(name), inputs(name, padded=name in ("llama", "bert"))


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return ours(name) if ":" in name else stock(name)


SEEN = (
    *("gemma2", "gpt_oss", "llama", "mistral", "gpt_neox", "bert", "modernbert", "dinov2_with_registers", "siglip"),
    *("t5", "bart", "whisper", "gpt2:softmax", "gpt2:bilateral_gaussian", "gpt2:t5_bias"),
    *("vit:bilateral", "vit:alibi", "vit:elliptical"),
)


FLOAT32_SOFTMAX = ("gemma2", "gpt_oss", "llama", "mistral", "gpt_neox", "modernbert", "siglip")
"""Models whose eager attention computes its softmax in float32, whatever they are."""


@torch.no_grad()
@pytest.mark.parametrize("name", SEEN)
def test_entropy_and_attention_received_are_those_of_the_models_attentions(name: str) -> None:
    """The model's own eager attention, which returns A, against the lens, which computes its rows."""
    model, given = made(name)
    for part in model.modules():  # in Transformers 5.17 the stacks of T5 do not hear what their model is told
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    if name == "llama":  # rows that see nothing are NaN in its float32 softmax of a float64 mask
        given = inputs(name)
    # Logits of up to 100, rounded to float32, give weights with a relative error of up to 100 / 2^24.
    exact, absolute = (1e-5, 1e-5) if name in FLOAT32_SOFTMAX else (1e-9, 1e-12)
    options = LensOptions(stack=STACKS.get(name), noise=0.0, spectra="none")
    report = inspect_model(model, given, options=options)
    result = model(**given, output_attentions=True, **_no_cache(model))
    attentions = getattr(result, "attentions", None)
    if attentions is None:
        side = "decoder" if "decoder" in (options.stack or "") else "encoder"
        attentions = result[f"{side}_attentions"]
    mask = given.get("attention_mask", torch.ones(attentions[0].shape[0], attentions[0].shape[-1]))
    real = mask.bool()
    assert len(report.layers) == len(attentions)
    for layer, weights in zip(report.layers, attentions, strict=True):
        shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)  # with sinks a row sums to less than 1
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        for head in layer.heads:
            rows = entropy[:, head.head][real]
            assert head.entropy == pytest.approx(float(rows.mean()), rel=exact, abs=absolute), layer.name
            received = (weights[:, head.head] * real[:, :, None]).sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(received.tolist(), rel=exact, abs=absolute)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_filters_put_into_a_model_are_seen(name: str) -> None:
    """The call that the lens sees computes what the model's layer returned, with its booster and positions."""
    model = build(name)
    apply_filter(
        model, boosting="twicing", position_kernel="gaussian", learn_bandwidths=True, **_special(name), layers=[1, 2]
    )
    calls = _calls(model, inputs(name))
    assert [call.booster.name for call, _ in calls] == ["none", "twicing", "twicing"]
    for call, output in calls:
        operator = _operator(call)
        torch.testing.assert_close(operator @ call.repeated()[1], output, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2:twicing", "gpt2:gradient_boosted", "vit:bilateral_twicing", "vit:nlm"])
def test_filters_of_our_models_are_seen(name: str) -> None:
    model, given = made(name)
    for call, output in _calls(model, given):
        torch.testing.assert_close(_operator(call) @ call.repeated()[1], output, rtol=1e-10, atol=1e-12)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _special(name: str) -> dict[str, Any]:
    return {"num_special_tokens": 1} if name == "vit" else {}


def _operator(call: FilterCall) -> torch.Tensor:
    from hf_imgproc_attn.models.backend_reference import filter_logits, reference_attention

    operator = reference_attention(filter_logits(call), call, "operator")[1]
    assert operator is not None
    return operator


def _calls(model: nn.Module, given: dict[str, torch.Tensor]) -> list[tuple[FilterCall, torch.Tensor]]:
    calls: list[tuple[FilterCall, torch.Tensor]] = []
    with (
        torch.no_grad(),
        observed(model, attention_layers(model), lambda index, call, output: calls.append((call, output))),
    ):
        model(**given, **_no_cache(model))
    return calls


# --------------------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "gpt2", "opt", "vit", "dinov2", "t5", "bart"])
def test_tokens_after_the_residual_connection(name: str) -> None:
    """What the block reads in its second half, taken from the parts of each architecture by their own names."""
    model = build(name)
    seen: dict[int, BlockTokens] = {}
    layers = [layer for layer in attention_layers(model) if layer.stack == STACKS.get(name, layer.stack)]
    inner = {
        "llama": "post_attention_layernorm",
        "gemma3": "pre_feedforward_layernorm",
        "gpt2": "ln_2",
        "opt": "final_layer_norm",
        "vit": "layernorm_after",
        "dinov2": "norm2",
        "bart": "self_attn_layer_norm",
    }
    block_of = {layer.name: model.get_submodule(_block(layer.name)) for layer in layers}
    wanted: list[torch.Tensor] = []
    hooks = []
    for layer in layers:
        block = block_of[layer.name]
        if name in inner:
            part = getattr(block, inner[name])
            hooks.append(part.register_forward_pre_hook(lambda module, args: wanted.append(args[0])))
        elif name == "t5":
            hooks.append(block.layer[0].register_forward_hook(lambda module, args, output: wanted.append(output[0])))
        else:  # parallel: the sum of what enters and the attention's output
            hooks.append(block.attention.register_forward_hook(lambda module, args, output: wanted.append(output[0])))
    with torch.no_grad(), observed(model, layers, None, seen.__setitem__):
        model(**inputs(name))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) == len(wanted)
    for index, tokens in seen.items():
        expected = wanted[index] + (tokens.entering if name == "gpt_neox" else 0.0)
        torch.testing.assert_close(tokens.after_residual, expected.view_as(tokens.entering), rtol=0, atol=1e-14)
        if index:
            torch.testing.assert_close(tokens.entering, seen[index - 1].leaving)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: max(i for i, part in enumerate(parts[:4]) if part.isdigit()) + 1])


def test_tokens_after_the_residual_of_bert_are_normed() -> None:
    model, seen = build("bert"), {}
    with torch.no_grad(), observed(model, attention_layers(model), None, seen.__setitem__):
        model(**inputs("bert"))
    norm = model.encoder.layer[0].attention.output.LayerNorm
    middle = seen[0].after_residual
    torch.testing.assert_close(norm((middle - norm.bias) / norm.weight), middle, rtol=1e-6, atol=1e-6)


def test_tokens_of_our_bert_are_those_of_the_stock_model() -> None:
    """Whose layer calls the attention's part as a whole; ours calls what is in it."""
    stock, seen = build("bert"), ({}, {})
    own = ImgProcBertModel(ImgProcBertConfig.from_preset("softmax", **stock.config.to_diff_dict())).eval()
    own.load_state_dict(stock.state_dict())
    for model, found in zip((stock, own.to(stock.dtype)), seen, strict=True):
        with torch.no_grad(), observed(model, attention_layers(model), None, found.__setitem__):
            model(**inputs("bert"))
    assert seen[0].keys() == seen[1].keys() != set()
    for index, tokens in seen[0].items():
        for wanted, got in zip(tokens, seen[1][index], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# The model is left as it was
# --------------------------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    held: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        hooks = tuple(len(getattr(module, hook)) for hook in ("_forward_hooks", "_forward_pre_hooks"))
        held[name] = (sorted(vars(module)), {key: id(value) for key, value in plain.items()}, hooks)
    return held


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
@pytest.mark.parametrize("name", ["llama", "vit", "gpt2:bilateral_gaussian", "filtered"])
def test_a_model_is_left_as_it_was(name: str, fails: bool) -> None:
    model, given = (build("llama"), inputs("llama")) if name == "filtered" else made(name)
    if name == "filtered":
        apply_filter(model, "twicing")
    model.train()
    next(iter(model.children())).eval()
    before, random = _state(model), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    if fails:
        broken = attention_layers(model)[1].module
        parameter = next(broken.parameters())
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="activations must be finite"):
            inspect_model(model, given, spectra="none")
        with torch.no_grad():
            parameter.copy_(weights[next(key for key, value in model.named_parameters() if value is parameter)])
    else:
        inspect_model(model, given, spectra="none")
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(
        {"call", "compose"} & set(vars(module)) for module in model.modules() if isinstance(module, AttentionFilter)
    )


def test_looking_twice_gives_the_same_numbers() -> None:
    model, given = made("vit:bilateral_twicing")
    first, second = (inspect_model(model, given) for _ in range(2))
    first.seconds = second.seconds = {}
    assert first.to_json() == second.to_json()


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------


def test_images_have_a_grid_and_special_tokens() -> None:
    model, given = stock("dinov2_with_registers")
    report = inspect_model(model, given)
    assert (report.length, report.grid, report.special, report.axes) == (12, [3, 3], 3, 2)
    assert report.token == 3 + 1 * 3 + 1
    assert report.skipped == []


@torch.no_grad()
def test_the_first_layer_is_decomposed_exactly_where_positions_are_added() -> None:
    """By the definition: token and position through the norm, whose statistics are those of their sum."""
    model = build("gpt2")
    given = {"input_ids": text(length=10)}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    block, attention = model.transformer.h[0], model.transformer.h[0].attn
    tokens, places = model.transformer.wte(given["input_ids"]), model.transformer.wpe.weight[:10]
    x = tokens + places
    sigma = (x.var(-1, unbiased=False, keepdim=True) + block.ln_1.eps).sqrt()

    def projected(part: torch.Tensor, which: int) -> torch.Tensor:
        normed = block.ln_1.weight * (part - part.mean(-1, keepdim=True)) / sigma
        columns = attention.c_attn.weight[:, 32 * which : 32 * (which + 1)]
        return (normed @ columns).unflatten(-1, (4, 8)).transpose(1, 2)

    constant = (block.ln_1.bias @ attention.c_attn.weight + attention.c_attn.bias)[:32].view(1, 4, 1, 8)
    query = {"content": projected(tokens, 0), "position": projected(places + 0 * tokens, 0)}
    query["constant"] = constant.expand_as(query["content"])
    key = {"content": projected(tokens, 1), "position": projected(places + 0 * tokens, 1)}
    for head in range(4):
        terms = {
            (a, b): query[a][:, head] @ key[b][:, head].mT for a in query for b in key
        }  # the constant of the keys changes no row
        total = sum(terms.values())
        covariances, variance = dict.fromkeys(terms, 0.0), 0.0
        for i in range(10):
            row = total[:, i, : i + 1]
            row = row - row.mean(-1, keepdim=True)
            variance += float(row.square().sum())
            for pair, term in terms.items():
                covariances[pair] += float((term[:, i, : i + 1] * row).sum())
        shares = report.layers[0].heads[head].exact_shares
        assert sum(shares.values()) == pytest.approx(1.0)
        for (a, b), value in covariances.items():
            assert shares[f"{a}-{b}"] == pytest.approx(value / variance, rel=1e-8), (head, a, b)
    assert report.layers[1].heads[0].exact_shares == {}


def test_vit_is_decomposed_exactly_too() -> None:
    model, given = build("vit"), inputs("vit")
    shares = inspect_model(model, given, spectra="none", noise=0.0).layers[0].heads[2].exact_shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert abs(shares["other"]) < 1e-9
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    shares = inspect_model(model, given, spectra="none", noise=0.0).layers[0].heads[2].exact_shares
    assert shares["position-position"] == shares["content-position"] == 0.0
    assert shares["content-content"] + shares["constant-content"] == pytest.approx(1.0)


def test_kernels_of_bilateral_models_are_shares_as_they_are() -> None:
    model, given = made("vit:bilateral_gaussian")
    report = inspect_model(model, given, spectra="none", noise=0.0)
    for layer in report.layers:
        for head in layer.heads:
            assert sum(head.shares.values()) == pytest.approx(1.0)
            assert "position kernel" in head.shares
            assert set(head.learned) >= {"h_y", "h_p"}


@pytest.mark.parametrize("name", ["gpt2:bilateral_twicing", "vit:softmax", "llama"])
def test_maps_are_rows_of_the_models_attention(name: str) -> None:
    model, given = made(name)
    report = inspect_model(model, given, token=9, spectra="none", noise=0.0)
    calls = _calls(model, given)
    for layer, (call, _) in zip(report.layers, calls, strict=True):
        rows = torch.tensor(layer.maps["product"], dtype=torch.float64)
        plain = call._replace(booster=call.booster._replace(name="none"))
        torch.testing.assert_close(rows, _operator(plain)[0, :, 9])
        if call.is_boosted:
            torch.testing.assert_close(
                torch.tensor(layer.maps["operator"], dtype=torch.float64), _operator(call)[0, :, 9]
            )
        for kernel in ("content", "position"):
            sums = torch.tensor(layer.maps[kernel], dtype=torch.float64).sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums))
            assert not torch.allclose(torch.tensor(layer.maps[kernel]).double(), rows)


def test_noise_of_the_asked_size_enters() -> None:
    for name in ("vit:softmax", "llama"):
        model, given = made(name)
        report = inspect_model(model, given, noise=0.05, spectra="none")
        assert set(report.layers[0].noise) == {"entering", "values", "filtered", "after_residual", "leaving"}
        if name == "llama":  # what enters the first block is the embedding itself, with a mean near 0
            assert report.layers[0].noise["entering"] == pytest.approx(-20 * math.log10(0.05), abs=0.5)
        for layer in report.layers:
            assert layer.alpha is not None
            assert all(0 < value < 80 for value in layer.noise.values())


def test_report_as_json_and_markdown() -> None:
    import json

    model, given = made("gpt2:bilateral_twicing")
    report = inspect_model(model, given, name="tiny")
    assert isinstance(report, Report)
    held = json.loads(report.to_json())
    assert held["layers"][1]["heads"][2]["entropy"] == pytest.approx(report.layers[1].heads[2].entropy, rel=1e-5)
    again = Report.from_dict(held)
    assert again.to_json() == report.to_json()
    assert isinstance(again.layers[0].heads[0].operator_spectrum, Spectrum)
    page = report.to_markdown()
    assert "# What tiny filters" in page
    assert "NaN" not in page
    assert "nan" not in page
    for title in ("## Heads", "## Tokens by depth", "## Noise (10 % of the input)", "## Spectra"):
        assert title in page


def test_report_as_page_and_pictures(tmp_path: Path) -> None:
    report = inspect_model(build("bert", num_hidden_layers=1), text(batch=2, length=6), noise=0.0, name="tiny")
    page = report.to_html(tmp_path / "lens.html")
    assert (tmp_path / "lens.html").read_text(encoding="utf-8") == page
    assert "<h1>What tiny filters</h1>" in page
    files = report.to_png(tmp_path / "pictures")
    assert [file.name for file in files] == [
        *("heads.png", "smoothing.png", "kernels.png", "spectra.png", "maps.png", "removed.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_model_without_inputs_sees_real_data() -> None:
    """What the command shows it; also of a model in training, which stays in it."""
    model = build("llama", num_hidden_layers=1).train()
    report = inspect_model(model, spectra="none", noise=0.0)
    assert (report.samples, report.length, report.data) == (16, 64, "texts that the model itself wrote")
    assert len(report.labels) == 64
    assert all(module.training for module in model.modules())
    assert report.to_dict()["layers"] == inspect_model(model, spectra="none", noise=0.0).to_dict()["layers"]
    with pytest.raises(ValueError, match="model must be a model, which is loaded already, got 'gpt2'"):
        inspect_model("gpt2")  # type: ignore[arg-type]


def test_a_text_and_a_misspelt_option_are_refused_with_what_to_do() -> None:
    model = build("llama", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"of texts and images: what the model's tokenizer .* got 'Once upon a time'$"
    ):
        inspect_model(model, "Once upon a time")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"unknown option of the lens 'layer': it must be one of .*did you mean layers\?"
    ):
        inspect_model(model, torch.ones(2, 4, dtype=torch.long), layer=[0])


# --------------------------------------------------------------------------------------------------------------------
# Filters of every kind
# --------------------------------------------------------------------------------------------------------------------


def test_filters_with_dependent_rows_are_seen_whole() -> None:
    """Sinkhorn's columns are normalised too."""
    config = tiny_vit_config("softmax", normalisation="sinkhorn", attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    for layer, weights in zip(report.layers, attentions, strict=True):
        for head in layer.heads:
            wanted = weights[:, head.head].sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(wanted.tolist(), rel=1e-9)


def test_differential_layers_show_their_first_map_and_the_difference() -> None:
    """A is the first map, whose rows sum to 1; p(A) are the model's own attentions, maps and spectra alike."""
    config = tiny_vit_config("differential", attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, token=3, noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    calls = _calls(model, given)
    for layer, difference, (call, _) in zip(report.layers, attentions, calls, strict=True):
        first = filter_matrix(filter_logits(call), call.visibility)
        assert (first - difference).abs().max() > 1e-2
        torch.testing.assert_close(torch.tensor(layer.maps["product"]).double(), first[0, :, 3])
        torch.testing.assert_close(torch.tensor(layer.maps["operator"]).double(), difference[0, :, 3])
        for head in layer.heads:
            assert head.received == pytest.approx(first[:, head.head].sum((0, 1)).div(len(first)).tolist())
            for spectrum, matrix in ((head.filter_spectrum, first), (head.operator_spectrum, difference)):
                wanted = torch.linalg.svdvals(matrix[0, head.head])
                assert spectrum is not None
                assert spectrum.singular_values == pytest.approx(wanted.tolist(), abs=1e-9)


@pytest.mark.parametrize("normalisation", ["sigmoid", "softpick", "sink"])
def test_rows_that_do_not_sum_to_one_are_seen_as_they_are(normalisation: str) -> None:
    """What all rows take from each token, and entropies between 0 and those of uniform weights."""
    config = tiny_vit_config("softmax", normalisation=normalisation, attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    assert (attentions[0].sum(-1) - 1).abs().max() > 1e-2
    for layer, weights in zip(report.layers, attentions, strict=True):
        for head in layer.heads:
            wanted = weights[:, head.head].sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(wanted.tolist(), rel=1e-9)
            assert 0 <= head.entropy_share <= 1


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_shown_or_refused_by_name(preset: str) -> None:
    """Of images where it goes, else of texts; ``product`` has the model's own weights' form, a row a head."""
    try:
        config = tiny_vit_config(preset, num_hidden_layers=2)
        model: nn.Module = hf_imgproc_attn.ImgProcViTForImageClassification(config)
        given = {"pixel_values": images()}
    except StrictDataclassError:  # a filter of texts
        model = hf_imgproc_attn.ImgProcGPT2LMHeadModel(tiny_gpt2_config(preset, n_layer=2))
        given = {"input_ids": token_ids(3, 10)}
    sharpen_(model.eval())
    report = inspect_model(model, given, noise=0.0)
    assert report.skipped == []
    for layer in report.layers:
        assert set(layer.maps) >= {"content", "position", "product"}
        assert all(math.isfinite(head.entropy) and head.operator_spectrum is not None for head in layer.heads)


def test_the_function_has_the_name_of_its_package() -> None:
    report = hf_imgproc_attn.lens(build("bert"), text(), spectra="none", noise=0.0)
    assert report.model_type == "bert"
