"""What the lens sees between the parts of a model, which is left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.lens import inspect_model
from hf_imgproc_attn.lens.observation import BlockTokens, observed
from hf_imgproc_attn.models.any_layers import attention_layers
from hf_imgproc_attn.models.configuration_imgproc_bert import ImgProcBertConfig
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.modeling_imgproc_bert import ImgProcBertModel
from tests.any_model.architectures import build, inputs
from tests.lens.lens_cases import STACKS, made


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
