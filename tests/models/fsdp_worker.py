"""One of the processes of `test_fully_sharded_models_give_the_same_gradients`, started by torchrun.

Usage: fsdp_worker.py [--full]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
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

SHARDED = [(backbone, variant) for backbone in ("gpt2", "vit") for variant in VARIANTS]
ONLY_FULL = [(("vit", "gpt2")[number % 2], variant) for number, variant in enumerate(VARIANTS)]
"""With ``--full``: else a variant is sharded on the other backbone alone."""
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


def run_policy(backbone: str, mesh: Any, rows: slice) -> None:
    """Forward and backward in bfloat16 by a policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(build(backbone, "mixed"), mesh, mp_policy=policy)
    model(**batch(backbone, rows)).loss.backward()
    if not all(whole(parameter.grad).isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{backbone}: gradients are not finite")


def compare_half(backbone: str, mesh: Any, rows: slice) -> None:
    """Weights in bfloat16, and the filters' numbers in float32, a unit of their own."""
    variant = "learned_twicing" if backbone == "llama" else "mixed"
    plain, sharded = (build(backbone, variant).bfloat16() for _ in range(2))
    sharded = shard(sharded, mesh)
    for model, part in ((plain, slice(None)), (sharded, rows)):
        inputs = batch(backbone, part).items()
        model(**{name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs}).loss.backward()
    wanted = {name: parameter.grad.float() for name, parameter in plain.named_parameters()}
    scalars = 0
    for name, parameter in sharded.named_parameters():
        is_scalar = "scalar_bias" in name
        scalars += is_scalar
        if parameter.dtype != (torch.float32 if is_scalar else torch.bfloat16):
            raise ValueError(f"{backbone} {name} is in {parameter.dtype}")
        error = (whole(parameter.grad).float() - wanted[name]).norm() / wanted[name].norm()
        if not error < 0.03:
            raise ValueError(f"{backbone} {name}: relative error {error}")
    if not scalars:
        raise ValueError(f"{backbone} has no numbers in float32")


def saved_in_parts(mesh: Any, rank: int) -> None:
    """Each process writes its share (``torch.distributed.checkpoint``); one reads it into a whole model, and back."""
    sharded, plain = shard(build("gpt2", "mixed"), mesh), build("gpt2", "mixed")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    checkpoint.save({"model": get_model_state_dict(sharded)}, checkpoint_id="parts")
    state = {"model": plain.state_dict()}
    checkpoint.load(state, checkpoint_id="parts", no_dist=True)
    plain.load_state_dict(state["model"])
    for name, parameter in sharded.named_parameters():
        if not torch.equal(whole(parameter), plain.get_parameter(name)):
            raise ValueError(f"{name} is not what was saved")
    if rank == 0:
        checkpoint.save({"model": plain.state_dict()}, checkpoint_id="one", no_dist=True)
    dist.barrier()
    for parameter in sharded.parameters():
        torch.nn.init.zeros_(parameter)
    state = {"model": get_model_state_dict(sharded)}
    checkpoint.load(state, checkpoint_id="one")
    set_model_state_dict(sharded, state["model"])
    for name, parameter in plain.named_parameters():
        if not torch.equal(whole(sharded.get_parameter(name)), parameter):
            raise ValueError(f"{name} is not what one process saved")


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
    for backbone, variant in SHARDED:
        if "--full" in sys.argv or (backbone, variant) not in ONLY_FULL:
            report[f"{backbone} {variant}"] = outcome(lambda b=backbone, v=variant: compare(b, v, mesh, rank))
    for backbone in ("gpt2", "vit"):
        report[f"{backbone} policy"] = outcome(lambda b=backbone: run_policy(b, mesh, rows))
    for variant in FILTERS:
        report[f"llama {variant}"] = outcome(lambda v=variant: compare("llama", v, mesh, rank))
    for backbone in ("gpt2", "vit", "llama"):
        report[f"{backbone} half"] = outcome(lambda b=backbone: compare_half(b, mesh, rows))
    report["saved in parts"] = outcome(lambda: saved_in_parts(mesh, rank))
    report["gpt2 far"] = outcome(lambda: run_far(mesh))
    Path(f"report_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
