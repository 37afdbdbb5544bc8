"""Whole GPT-2 models on the Triton kernels, in Triton's interpreter: part of ``interpreter_worker``."""

from __future__ import annotations

from typing import Any

import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, pad, token_ids

STEPS: dict[str, Any] = {"boosting": "twicing", "boosting_steps": 3}
LEARNED: dict[str, Any] = {"boosting": "learned", "position_kernel": "gaussian", "learn_bandwidths": True}


def model_of(backend: str, **fields: Any) -> ImgProcGPT2LMHeadModel:
    """One layer of two heads; the interpreter takes a second for each."""
    torch.manual_seed(0)
    model = sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(n_layer=1, n_head=2, **fields)))
    model.config.filter_backend = backend
    return model


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).detach())


def trained() -> list[float]:
    """Gaussian contents, positions as columns, three steps: errors of the logits and of all gradients."""
    ids, found = token_ids(batch=1, length=8), []
    for backend in ("triton", "reference"):
        model = model_of(backend, content_kernel="gaussian", position_kernel="untied", **STEPS)
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append([output.logits, *(x.grad for x in model.parameters() if x.grad is not None)])
    return [relative(mine, right) for mine, right in zip(*found, strict=True)]


@torch.no_grad()
def decoded() -> list[float]:
    """A padded prompt in chunks of 5 and 3 tokens, then a token: errors of the logits of what is not padding."""
    inputs, found = pad(token_ids(batch=2, length=9), 0, 7, "left"), []
    places, mask = inputs["position_ids"], inputs["attention_mask"]
    whole = model_of("reference", **LEARNED).eval()(**inputs).logits
    model, cache, start = model_of("triton", **LEARNED).eval(), None, 0
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
    return {"trained": trained(), "decoded": decoded(), "dropped": dropped()}
