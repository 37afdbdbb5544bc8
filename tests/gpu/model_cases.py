"""Whole models on the Triton kernels, in Triton's interpreter: part of ``interpreter_worker``."""

from __future__ import annotations

from typing import Any

import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.gradient_cases import ONE_DIRECTION, REFUSED, VALUES, differentiated
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, images, pad, token_ids, vit_config

STEPS: dict[str, Any] = {"boosting": "twicing", "boosting_steps": 3}
LEARNED: dict[str, Any] = {"boosting": "learned", "position_kernel": "gaussian", "learn_bandwidths": True}


def model_of(backend: str, **fields: Any) -> ImgProcGPT2LMHeadModel:
    """One layer of two heads; the interpreter takes a second for each."""
    torch.manual_seed(0)
    model = sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(**{"n_layer": 1, "n_head": 2, **fields})))
    model.config.filter_backend = backend
    return model


def relative(got: torch.Tensor, wanted: torch.Tensor, least: float = 1e-6) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max().clamp(min=least)).detach())


def trained(**fields: Any) -> list[float]:
    """Gaussian contents, positions as columns, three steps: errors of the logits and of all gradients."""
    fields = fields or {"content_kernel": "gaussian", "position_kernel": "untied", **STEPS}
    inputs, found = pad(token_ids(batch=2, length=8), 0, 6, "right"), []
    for backend in ("triton", "reference"):
        model = model_of(backend, **fields)
        seen = inputs["attention_mask"].bool()
        output = model(**inputs, labels=inputs["input_ids"].masked_fill(~seen, -100), use_cache=False)
        output.loss.backward()
        found.append([output.logits[seen], *(x.grad for x in model.parameters() if x.grad is not None)])
    return [relative(mine, right) for mine, right in zip(*found, strict=True)]


RIVALS: dict[str, dict[str, Any]] = {
    "sink": {"normalisation": "sink", "boosting": "twicing", "gate": "elementwise"},
    "forget": {"position_kernel": "forget", "boosting": "inversion", "n_layer": 2, "feedback": "value_residual"},
    "sigmoid": {"normalisation": "sigmoid", "content_kernel": "cosine", "boosting": "differential"},
    "softpick": {"normalisation": "softpick", "boosting": "exclusive", "gate": "headwise"},
    "elliptical": {"content_kernel": "elliptical", "n_layer": 2, "boosting": "dynamic_inversion"},
}
"""Values of the same axes: each normalisation, and boosters, gates and feedback that work on top of any back-end."""


def layers() -> dict[str, list[float]]:
    """The error of the output, and of the gradients of all inputs and parameters, of one layer of each value."""
    found = {}
    for name in (name for name in VALUES if name not in REFUSED["triton"]):
        is_causal = (name, True) not in ONE_DIRECTION
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            layer, leaves = differentiated(name, is_causal, dtype)
            output = layer(backend, *leaves)
            weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=dtype).view_as(output)
            used = torch.autograd.grad(output, leaves, weights, allow_unused=True)
            results.append([output, *(x for x in used if x is not None)])
        found[name] = [relative(mine, right, 0.05) for mine, right in zip(*results, strict=True)]
    return found


def scaled() -> list[float]:
    """The same of a ViT with columns of A that sum to 1 too: a bias of queries, a number a key, does nothing."""
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        fields = {"normalisation": "sinkhorn", "boosting": "twicing", "num_hidden_layers": 1}
        model = sharpen_(ImgProcViTForImageClassification(vit_config(**fields)))
        model.config.filter_backend = backend
        output = model(images(batch=1), labels=torch.tensor([1]))
        output.loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if not name.endswith("q_proj.bias")}
        found.append([output.logits, *(x for x in gradients.values() if x is not None)])
    return [relative(mine, right) for mine, right in zip(*found, strict=True)]


@torch.no_grad()
def decoded(**fields: Any) -> list[float]:
    """A padded prompt in chunks of 5 and 3 tokens, then a token: errors of the logits of what is not padding."""
    fields = fields or LEARNED
    inputs, found = pad(token_ids(batch=2, length=9), 0, 7, "left"), []
    places, mask = inputs["position_ids"], inputs["attention_mask"]
    whole = model_of("reference", **fields).eval()(**inputs).logits
    model, cache, start = model_of("triton", **fields).eval(), None, 0
    for end in (5, 8, 9):
        output = model(
            inputs["input_ids"][:, start:end],
            attention_mask=mask[:, :end],
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        seen = mask[:, start:end].bool()
        found.append(relative(output.logits[seen], whole[:, start:end][seen]))
        cache, start = output.past_key_values, end
    return found


def dropped() -> dict[str, float]:
    """Gradients of a model with dropout: checkpointed layers drop the same weights again; another seed others."""
    ids, found = token_ids(batch=1, length=8), []
    for seed, checkpointed in ((1, False), (1, True), (2, False)):
        model = model_of("triton", boosting="twicing", attn_pdrop=0.4).train()
        if checkpointed:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        torch.manual_seed(seed)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(model.transformer.wte.weight.grad)
    return {"checkpointed": relative(found[1], found[0]), "another seed": relative(found[2], found[0])}


def found() -> dict[str, Any]:
    rivals = {name: trained(**fields) for name, fields in RIVALS.items()}
    steps = {
        name: decoded(**{**fields, "n_layer": 1, "feedback": "none"})
        for name, fields in RIVALS.items()
        if name != "elliptical"  # which compares a layer with the one before
    }
    rivals["sinkhorn"] = scaled()
    whole = {"trained": trained(), "decoded": decoded(), "dropped": dropped(), "rivals": rivals, "steps": steps}
    return {**whole, "layers": layers()}
