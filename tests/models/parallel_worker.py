"""One of the two processes of `test_parallel.py`, started by torchrun: each case against one process with it all."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.distributed import DistributedConfig

from hf_imgproc_attn import ImgProcBertConfig, ImgProcBertForMaskedLM, ImgProcGPT2Config, apply_filter
from hf_imgproc_attn.context_parallel import add_gradients, context_parallel, share_tokens
from hf_imgproc_attn.measure import scaling
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.any_model.architectures import build as stock_model
from tests.models.helpers import sharpen_
from tests.models.variants import VARIANTS, gpt2_config, images, token_ids, vit_config

HEADS_GPT2 = ("softmax", "bilateral", "twicing", "mixed", "mixed_kernels", "shared", "looking_back")
"""Variants with heads that several processes share: learned numbers a head, positions a head, several steps."""
HEADS_ENCODERS = (("vit", "bilateral_twicing"), ("vit", "mixed_kernels"), ("bert", "twicing"), ("bert", "bilateral"))
HEADS_LLAMA = ("learned_twicing", "neutreno", "alibi", "sink", "value_residual")
"""Likewise filters in a Llama, some with numbers that start where they change nothing."""


TOKENS_GPT2 = (
    *("softmax", "bilateral", "twicing", "mixed_kernels", "mixed_boosters", "looking_back"),
    *("normalisations", "one_pass", "single_weights"),
)
"""Variants whose tokens several processes share."""
TOKENS_BERT = ("bilateral_twicing", "elliptical", "robust")
BERT = {
    "vocab_size": 61,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def numbers_(model: torch.nn.Module) -> torch.nn.Module:
    """Numbers of the filters that differ from head to head."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "scalar_bias" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def close(name: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Raise unless two tensors are equal but for rounding."""
    difference = (got - wanted).abs().max().item()
    if not difference <= tolerance * (1.0 + wanted.abs().max().item()):
        raise ValueError(f"{name}: {difference}")


def same_step(plain: Any, shared: Any, inputs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Logits, loss and every gradient."""
    outputs = [model(**inputs) for model in (plain, shared)]
    for output in outputs:
        output.loss.backward()
    close("logits", whole(outputs[1].logits), outputs[0].logits, tolerance)
    close("loss", whole(outputs[1].loss), outputs[0].loss, tolerance)
    gradients = dict(shared.named_parameters())
    for name, parameter in plain.named_parameters():
        close(name, whole(gradients[name].grad), parameter.grad, tolerance)


def loaded(folder: Path, model: Any, kind: Any, **options: Any) -> Any:
    """A model that one process saves, and all load with their share of its heads."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return kind.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), **options)


def refused_by_torch(variant: str, plain: Any) -> None:
    """Older versions cannot put parts of parts together again."""
    try:
        loaded(Path(f"gpt2_{variant}"), plain, ImgProcGPT2LMHeadModel)
    except ValueError as error:
        if "which needs torch 2.13 or newer" not in str(error):
            raise
    else:
        raise ValueError("an old version of torch was not refused")


def heads_of_gpt2(variant: str) -> None:
    """By the plan of the configuration; saved again whole."""
    plain = numbers_(sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(variant)))).train()
    if torch.__version__ < "2.13":
        refused_by_torch(variant, plain)
        return
    shared = loaded(Path(f"gpt2_{variant}"), plain, ImgProcGPT2LMHeadModel).train()
    weight = shared.transformer.h[0].attn.c_attn.weight
    if tuple(weight.to_local().shape) != (20, 30):
        raise ValueError(f"this process has {tuple(weight.to_local().shape)} of {tuple(weight.shape)}")
    same_step(plain, shared, {"input_ids": token_ids(batch=2), "labels": token_ids(batch=2)}, 1e-5)
    shared.save_pretrained(f"again_{variant}")
    dist.barrier()
    again = ImgProcGPT2LMHeadModel.from_pretrained(f"again_{variant}")
    for name, parameter in plain.named_parameters():
        if not torch.equal(parameter, again.get_parameter(name)):
            raise ValueError(f"{name} is not what was saved")


def heads_of_llama(preset: str) -> None:
    """By the plan of a model that keeps its class; the filter is put in when its weights are cut already."""
    stock = stock_model("llama").float()
    shared = loaded(Path("llama"), stock, type(stock), dtype=torch.float32)
    plain, shared = (numbers_(apply_filter(model, preset)).train() for model in (stock, shared))
    ids = torch.randint(0, stock.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    same_step(plain, shared, {"input_ids": ids, "labels": ids}, 1e-5)
    counts = {part.filter.num_heads for part in shared.modules() if hasattr(part, "layer_name")}
    if counts != {stock.config.num_attention_heads // 2}:
        raise ValueError(f"filters have {counts} heads here")


def heads_of_encoders(backbone: str, variant: str) -> None:
    """By the plans of the configurations."""
    if backbone == "vit":
        plain = numbers_(sharpen_(ImgProcViTForImageClassification(vit_config(variant)))).train()
        inputs = {"pixel_values": images(batch=2), "labels": torch.tensor([2, 0])}
    else:
        config = ImgProcBertConfig.from_preset(variant, **BERT)
        plain = numbers_(sharpen_(ImgProcBertForMaskedLM(config))).train()
        inputs = {"input_ids": token_ids(batch=2), "labels": token_ids(batch=2)}
    shared = loaded(Path(f"{backbone}_{variant}"), plain, type(plain)).train()
    same_step(plain, shared, inputs, 1e-5)


def own_projections_are_refused() -> None:
    """What has projections a head that no plan cuts."""
    for variant, words in (("gated", "the gate"), ("delta", "boosting 'delta'")):
        model = ImgProcGPT2LMHeadModel(gpt2_config(variant))
        try:
            loaded(Path(f"gpt2_{variant}"), model, ImgProcGPT2LMHeadModel)
        except ValueError as error:
            if f"tensor parallelism knows no plan for {words} of layer 0" not in str(error):
                raise
        else:
            raise ValueError(f"{variant} was not refused")


def same_tokens(
    plain: Any, ids: torch.Tensor, tolerance: float, padded: bool = False, next_token: bool = True
) -> None:
    """A step over parts of the texts against one over the whole: logits, loss and every gradient."""
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, -3:] = mask[1, :2] = 0
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    shared = copy.deepcopy(plain)
    whole_output = plain(**batch)
    whole_output.loss.backward()
    with context_parallel(shared):
        part = shared(**share_tokens(batch, next_token=next_token))
        part.loss.backward()
        add_gradients(shared)
    loss = part.loss.detach().clone()
    dist.all_reduce(loss)
    rank, size = dist.get_rank(), dist.get_world_size()
    seen = slice(None) if not padded else mask.chunk(size, dim=1)[rank] != 0
    close("logits", part.logits[seen], whole_output.logits.chunk(size, dim=1)[rank][seen], tolerance)
    close("loss", loss, whole_output.loss, 1e-6)  # Transformers computes it in float32
    gradients = dict(shared.named_parameters())
    for name, parameter in plain.named_parameters():
        close(name, gradients[name].grad, parameter.grad, tolerance)
    shared.zero_grad()
    again = shared(**batch)  # outside of the block it is the model that it was
    close("later", again.logits, whole_output.logits, tolerance)


def tokens_of_gpt2(variant: str, dtype: torch.dtype = torch.float64, padded: bool = False) -> None:
    """A GPT-2 of this package."""
    plain = numbers_(sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(variant)))).to(dtype).train()
    if variant == "twicing" and padded:  # computed again in the backward pass
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_tokens(plain, token_ids(batch=2, length=12), 1e-10 if dtype == torch.float64 else 1e-5, padded)


def tokens_of_llama(preset: str) -> None:
    """A model that keeps its class."""
    plain = numbers_(apply_filter(stock_model("llama"), preset)).train()
    ids = torch.randint(0, plain.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    same_tokens(plain, ids, 1e-10)


def tokens_of_bert(preset: str) -> None:
    """Without a causal mask: every token sees those of all processes."""
    plain = numbers_(sharpen_(ImgProcBertForMaskedLM(ImgProcBertConfig.from_preset(preset, **BERT)))).double().train()
    same_tokens(plain, token_ids(batch=2, length=12), 1e-10, padded=True, next_token=False)


class Exchanged(TorchDispatchMode):
    """Counts the bytes of what processes put together: all parts of a gather, or the whole of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        exchanges = func.namespace == "c10d" or str(func).startswith("_c10d_functional.all_")
        if exchanges:
            leaves = [[x for x in tree_leaves(arg) if isinstance(x, torch.Tensor)] for arg in args]
            self.bytes += max(sum(x.nbytes for x in tensors) for tensors in leaves)
        return func(*args, **(kwargs or {}))


def bytes_of_a_step(layers: int, preset: str, tokens: bool) -> int:
    """What a model with so many layers of 16 features exchanges in a step of 2 x 8 tokens, in float32."""
    size = {"n_layer": layers, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    torch.manual_seed(0)
    config = ImgProcGPT2Config.from_preset(preset, **size, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model: Any = ImgProcGPT2LMHeadModel(config)
    batch = {"input_ids": token_ids(batch=2, length=8) % 32}
    batch["labels"] = batch["input_ids"]
    if tokens:
        context: Any = context_parallel(model)
        batch = share_tokens(batch)
    else:
        context, model = contextlib.nullcontext(), loaded(Path(f"counted_{layers}"), model, type(model))
    with context, Exchanged() as exchanged:
        model(**batch).loss.backward()
    return exchanged.bytes


def bytes_of_a_layer(preset: str, tokens: bool) -> None:
    """As the formulas of the scaling page have them."""
    if not tokens and torch.__version__ < "2.13":
        return  # refused: see above
    counted = bytes_of_a_step(2, preset, tokens) - bytes_of_a_step(1, preset, tokens)
    if tokens:  # half of what is put together comes from the other process
        got = counted / 2
        wanted = 2 * scaling.context_received_bytes(16, 16, scaling.gathered_rows(preset), 2, bytes_each=4)
    else:  # a ring sends a sum twice, but for the part that is here
        got, wanted = counted * 2 / 2, scaling.heads_sent_bytes(16, 16, 2, bytes_each=4)
    if got != wanted:
        raise ValueError(f"{got} bytes, by the formula {wanted}")


def outcome(function: Callable[[], None]) -> str:
    """The word ok or the error; all processes fail alike."""
    try:
        function()
    except Exception as error:
        if "--raise" in sys.argv:
            raise
        return f"{type(error).__name__}: {error}"
    return "ok"


HEADS = {
    **{f"heads of gpt2 {variant}": partial(heads_of_gpt2, variant) for variant in HEADS_GPT2},
    **{f"heads of {name} {variant}": partial(heads_of_encoders, name, variant) for name, variant in HEADS_ENCODERS},
    **{f"heads of llama {preset}": partial(heads_of_llama, preset) for preset in HEADS_LLAMA},
    "heads with projections of their own": own_projections_are_refused,
}
TOKENS = {
    **{f"tokens of gpt2 {variant}": partial(tokens_of_gpt2, variant) for variant in TOKENS_GPT2},
    **{f"tokens of gpt2 {v}, padded": partial(tokens_of_gpt2, v, padded=True) for v in ("twicing", "mixed_kernels")},
    "tokens of gpt2 twicing in float32": partial(tokens_of_gpt2, "twicing", torch.float32),
    **{f"tokens of bert {preset}": partial(tokens_of_bert, preset) for preset in TOKENS_BERT},
    **{f"tokens of llama {preset}": partial(tokens_of_llama, preset) for preset in HEADS_LLAMA},
}
BYTES = {
    **{
        f"bytes of tokens, {preset}": partial(bytes_of_a_layer, preset, True)
        for preset in ("softmax", "bilateral_twicing")
    },
    "bytes of heads": partial(bytes_of_a_layer, "twicing", False),
}
CASES: dict[str, Callable[[], None]] = {**HEADS, **TOKENS, **BYTES}
ONLY_FULL = {f"tokens of gpt2 {v}": partial(tokens_of_gpt2, v) for v in VARIANTS if v not in TOKENS_GPT2}
"""With ``--full``."""


def main() -> None:
    """Write what came of every case to `report_RANK.json`."""
    dist.init_process_group("gloo")
    chosen = {**CASES, **(ONLY_FULL if "--full" in sys.argv else {})}
    report = {name: outcome(case) for name, case in chosen.items()}
    Path(f"report_{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
