"""Compiled and exported models give the same, and one graph serves every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing

from hf_imgproc_attn.models import backend_chunked
from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.boost_weights import Robust
from hf_imgproc_attn.models.kernel_given import FeaturePositions
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from tests.models.ecosystem_cases import BACKBONES, build, inputs_of, real_logits
from tests.models.helpers import filter_call
from tests.models.layer_cases import random
from tests.models.variants import (
    assert_same_gradients,
    gradients,
    token_ids,
)

pytestmark = pytest.mark.filterwarnings(
    # The newest versions have another name for it, the oldest supported ones do not; PEFT asks by the old one.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_models_give_the_same(backbone: str) -> None:
    """In one graph, forward and backward, every kind of layer."""
    torch._dynamo.reset()
    model = build(backbone, "mixed").double().eval()
    inputs = inputs_of(backbone, torch.float64)
    del inputs["labels"]
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        logits = real_logits(backbone, run(**inputs, **uncached(backbone)).logits)
        results.append((logits, gradients(model, logits.log_softmax(-1)[..., 0].mean())))
    (wanted, wanted_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, wanted)
    assert_same_gradients(got_gradients, wanted_gradients, rtol=1e-7, atol=1e-9)


def uncached(backbone: str) -> dict[str, bool]:
    """The argument that switches the cache off, where there is one."""
    return {"use_cache": False} if backbone == "gpt2" else {}


def test_new_lengths_do_not_recompile_for_ever() -> None:
    """One graph for the first length and one for all others, as the stock model needs."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = build("gpt2", "mixed").eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in (9, 7, 8, 11, 12, 10):
            ids = token_ids(length=length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count <= 2


def by_place(*always: str) -> list[Any]:
    """Variants with positions by place; all of them with ``--full``, for each compiles for seconds."""
    names = ("bilateral_gaussian", "t5_bias", "alibi")
    return [pytest.param(name, marks=() if name in always else pytest.mark.full) for name in names]


def padded(length: int) -> dict[str, torch.Tensor]:
    """Two texts, the first with two tokens of padding at the left."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": token_ids(length=length)[:2], "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("variant", by_place("bilateral_gaussian", "t5_bias"))
def test_one_dynamic_graph_serves_every_length(variant: str) -> None:
    """The choice of a back-end compares sizes; in a traced graph it must not."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = build("gpt2", variant).eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 7, 12, 5, 16):
            got, wanted = (run(**padded(length), use_cache=False).logits for run in (compiled, model))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("variant", by_place("t5_bias", "alibi"))
def test_an_exported_model_serves_every_length(variant: str) -> None:
    model = build("gpt2", variant).eval()
    length = torch.export.Dim("length", min=2, max=100_000)
    shapes = {name: {1: length} for name in padded(9)}
    options = {"dynamic_shapes": {**shapes, "use_cache": None}, "strict": False}
    exported = torch.export.export(model, (), {**padded(9), "use_cache": False}, **options).module()
    with torch.no_grad():
        for size in (9, 14, 23):
            got, wanted = (run(**padded(size), use_cache=False).logits for run in (exported, model))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_decoding_does_not_recompile_for_ever() -> None:
    """Growing caches become dynamic shapes; streams are no exception."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = build("gpt2", "mixed").eval()
    compiled = torch.compile(model, backend=counter)
    ids = token_ids(length=14)
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
        logits = []
        for position in range(5, 14):
            output = compiled(ids[:, position : position + 1], past_key_values=cache)
            logits.append(output.logits)
            if position == 8:
                warm = counter.frame_count
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == warm


@pytest.mark.parametrize(
    "changes",
    [
        {"normalisation": Normalisation("softpick")},
        pytest.param({"by_weights": Robust.of(1, "mcp")}, marks=pytest.mark.full),
    ],
    ids=["softpick", "mcp"],
)
def test_chunks_compile_for_every_length(changes: dict[str, Any]) -> None:
    """Numbers that only a block's code reads, such as the epsilon of ``softpick``, are inputs of such a graph."""
    torch._dynamo.reset()

    def attend(*rows: torch.Tensor) -> torch.Tensor:
        return backend_chunked.run(filter_call(*rows, is_causal=True)._replace(**changes), block_rows=4)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 7):
        rows = [random(2, 2, length, 4, seed=seed).requires_grad_() for seed in range(3)]
        for row in rows:  # the length alone is a symbol: reasoning about four of them takes half a minute
            torch._dynamo.mark_static(row, [0, 1, 3])
        got, wanted = (torch.autograd.grad(run(*rows).square().sum(), rows) for run in (compiled, attend))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("position", [True, False], ids=["features", "no positions"])
def test_half_precision_by_fused_calls_compiles_in_one_graph(position: bool) -> None:
    """What they are given is put together another way than in single precision."""
    torch._dynamo.reset()
    features = FeaturePositions(*(random(1, 1, 5, 3, seed=seed).bfloat16() for seed in (3, 4)))

    def attend(*rows: torch.Tensor) -> torch.Tensor:
        call = filter_call(*rows, is_causal=True, boosting="twicing", positions=features if position else None)
        return BACKENDS["sdpa"].run(call)

    rows = [random(2, 2, 5, 8, seed=seed).bfloat16() for seed in range(3)]
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*rows), attend(*rows), rtol=0, atol=0)
