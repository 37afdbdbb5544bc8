"""What a filter costs in another model: nothing where there is none; in a decoding step as much as in our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel, apply_filter, remove_filter
from hf_imgproc_attn.measure.benchmark.whole_models import GPT2_TINY
from tests.any_model.architectures import build, text


class Operations(TorchDispatchMode):
    """The names of the operations that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> list[str]:
    with torch.no_grad(), Operations() as seen:
        call()
    return seen.names


def parts(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What is looked up when a module runs, and what it holds."""
    return {
        name: (
            type(module),
            module.forward.__func__,
            vars(module).get("forward"),
            id(vars(module).get("config")),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._load_state_dict_pre_hooks),
            sorted(set(vars(module)) - {"_modules"}),
            sorted(module._modules),
        )
        for name, module in model.named_modules()
    }


def test_layers_without_a_filter_stay_what_they_are() -> None:
    model, ids = build("llama"), text()
    before, steps = parts(model), operations(lambda: model(ids))
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    apply_filter(build("llama"), "twicing")  # what is done for all models of the process
    assert operations(lambda: model(ids)) == steps
    apply_filter(model, "learned_twicing", layers=[-1])
    found = parts(model)
    changed = {name for name in before if found[name] != before[name]}
    assert changed == {"model.layers.2.self_attn"}
    assert all(name.startswith("model.layers.2.self_attn.imgproc_filter") for name in found.keys() - before.keys())
    remove_filter(model)
    assert parts(model) == before
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert operations(lambda: model(ids)) == steps


def step(model: Any, length: int = 12) -> list[str]:
    """Operations of a decoding step, when some tokens are there already."""
    cache, ids = DynamicCache(config=model.config), text(batch=1, length=length + 2)
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache)
        model(ids[:, length : length + 1], past_key_values=cache)
    return operations(lambda: model(ids[:, -1:], past_key_values=cache))


def test_a_decoding_step_of_a_filtered_gpt2_costs_what_that_of_our_own_does() -> None:
    """Hardly more operations, and none that copies all keys, values or rows, as those of the stock cache do."""
    sizes = {**GPT2_TINY, "bos_token_id": 0, "eos_token_id": 0}
    stock = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    copies = step(stock).count("aten.cat.default")
    own = step(ImgProcGPT2LMHeadModel(ImgProcGPT2Config(**sizes, boosting="twicing")).eval())
    found = step(apply_filter(stock, "twicing"))
    assert len(found) <= 1.1 * len(own)
    assert copies == 2 * sizes["n_layer"]
    assert "aten.cat.default" not in found


def test_streams_of_one_layer_have_room_of_their_own() -> None:
    """What they share, each new row of one would copy all rows of the other."""
    sizes = {**GPT2_TINY, "bos_token_id": 0, "eos_token_id": 0}
    model = apply_filter(GPT2LMHeadModel(GPT2Config(**sizes)).eval(), "twicing", boosting_steps=3)
    assert "aten.new_empty.default" not in step(model)
