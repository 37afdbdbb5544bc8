"""One of the processes of `test_fully_sharded_models_give_the_same_gradients`, started by torchrun."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.any_model.architectures import build as stock_model
from tests.any_model.architectures import text
from tests.models.helpers import sharpen_
from tests.models.variants import VARIANTS, gpt2_config, images, token_ids, vit_config

FILTERS = ("learned_twicing", "neutreno", "alibi")
"""Of a Llama that keeps its class: one with numbers of its own, one that compares layers, one that sees places."""


def build(backbone: str, variant: str) -> torch.nn.Module:
    """The same model in every process."""
    if backbone == "llama":
        return apply_filter(stock_model("llama").float(), variant)
    if backbone == "gpt2":
        return sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(variant)))
    return sharpen_(ImgProcViTForImageClassification(vit_config(variant)))


def batch(backbone: str, rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of a batch of four."""
    if backbone == "llama":
        return {"input_ids": text(batch=4)[rows], "labels": text(batch=4)[rows]}
    if backbone == "gpt2":
        return {"input_ids": token_ids(batch=4)[rows], "labels": token_ids(batch=4)[rows]}
    return {"pixel_values": images(batch=4)[rows], "labels": torch.tensor([2, 0, 1, 1])[rows]}


def shard(model: torch.nn.Module, mesh: Any, **options: Any) -> torch.nn.Module:
    """Every module of a class that the model names, inner ones first, and then the rest."""
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(backbone: str, variant: str, mesh: Any, rank: int) -> None:
    """The mean over processes is the mean over the batch."""
    plain, sharded = build(backbone, variant), shard(build(backbone, variant), mesh)
    rows = slice(2 * rank, 2 * rank + 2)
    for checkpointing in (False, True):
        if checkpointing:
            for model in (plain, sharded):
                model.train()
            sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for model, part in ((plain, slice(None)), (sharded, rows)):
            model.zero_grad()
            model(**batch(backbone, part)).loss.backward()
        wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
        for name, parameter in sharded.named_parameters():
            difference = (whole(parameter.grad) - wanted[name]).abs().max()
            if difference > 1e-5 + 1e-3 * wanted[name].abs().max():
                raise ValueError(f"{backbone} {variant} {name}: {difference}")


def run_half(backbone: str, mesh: Any, rows: slice, policy: bool) -> None:
    """Forward and backward in bfloat16, by a policy or because the model is."""
    model, inputs = build(backbone, "mixed"), batch(backbone, rows)
    if policy:
        model = shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    else:
        model = shard(model.bfloat16(), mesh)
        inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    model(**inputs).loss.backward()
    if not all(whole(parameter.grad).isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{backbone}: gradients are not finite")


def run_far(mesh: Any) -> None:
    """Sharding casts what blocks are given to bfloat16, in which 257 is 256: positions must survive it."""
    config = {"n_positions": 1400, "position_bandwidth": 2.0, "content_bandwidth": 40.0, "attn_implementation": "sdpa"}
    plain, sharded = (sharpen_(ImgProcGPT2LMHeadModel(gpt2_config("bilateral_gaussian", **config))) for _ in range(2))
    sharded = shard(sharded, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        wanted, got = (model(token_ids(batch=1, length=1400)).logits[:, -60:].float() for model in (plain, sharded))
    error = ((got - wanted).norm() / wanted.norm()).item()
    if error > 0.05:
        raise ValueError(f"relative error of far tokens {error}")


def outcome(function: Callable[[], None]) -> str:
    """The word ok or the error; all processes fail alike."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    """Write what came of every case to `report_RANK.json`."""
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    rows, report = slice(2 * rank, 2 * rank + 2), {}
    for backbone in ("gpt2", "vit"):
        for variant in VARIANTS:
            report[f"{backbone} {variant}"] = outcome(lambda b=backbone, v=variant: compare(b, v, mesh, rank))
        report[f"{backbone} policy"] = outcome(lambda b=backbone: run_half(b, mesh, rows, policy=True))
        report[f"{backbone} half"] = outcome(lambda b=backbone: run_half(b, mesh, rows, policy=False))
    for variant in FILTERS:
        report[f"llama {variant}"] = outcome(lambda v=variant: compare("llama", v, mesh, rank))
    report["gpt2 far"] = outcome(lambda: run_far(mesh))
    Path(f"report_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
