"""torch's FLOP counter tells what the back-ends compute: against the arithmetic of the passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hf_imgproc_attn import filter_attention
from hf_imgproc_attn.gpu import fused
from hf_imgproc_attn.models.backend_call import Difference
from hf_imgproc_attn.models.backend_flops import register_formulas
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.helpers import filter_call
from tests.models.variants import gpt2_config, token_ids

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 64, 16
ONE_PRODUCT = 2 * BATCH * HEADS * LENGTH**2 * WIDTH

# Products of N x N and N x d, forward and backward: k applications of A after one product for the logits, which the
# blocks make again, or one fused attention (2 forward; 5 backward, which makes the logits again) for each application.
PRODUCTS = {
    ("none", 1, "reference"): (2, 4),
    ("none", 1, "blocked"): (2, 5),
    ("none", 1, "sdpa"): (2, 5),
    ("twicing", 2, "reference"): (3, 6),
    ("twicing", 2, "blocked"): (3, 7),
    ("twicing", 2, "sdpa"): (4, 10),
    ("twicing", 3, "reference"): (4, 8),
    ("twicing", 3, "blocked"): (4, 9),
    ("twicing", 3, "sdpa"): (6, 15),
}


def flops(function: Any) -> int:
    """What torch counts of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("boosting", "steps", "backend"), PRODUCTS)
def test_filters_are_counted_forward_and_backward(boosting: str, steps: int, backend: str) -> None:
    query, key, value = (torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(3))
    outputs = []
    options: dict[str, Any] = {"boosting": boosting, "boosting_steps": steps, "backend": backend}
    forward = flops(lambda: outputs.append(filter_attention(query, key, value, **options)))
    backward = flops(lambda: outputs[0].sum().backward())
    assert (forward / ONE_PRODUCT, backward / ONE_PRODUCT) == PRODUCTS[boosting, steps, backend]


def test_a_second_map_is_multiplied_with_the_values_once() -> None:
    """Logits of two maps and one product with V; two attentions have 4 and 10 products."""
    leaves = [torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(5)]
    share = torch.full((HEADS, 1, 1), 0.3, requires_grad=True)
    call = filter_call(*leaves[:3])._replace(difference=Difference(*leaves[3:], share))
    for backend, products in (("blocked", (3, 8)), ("sdpa", (4, 10))):
        outputs: list[torch.Tensor] = []
        forward = flops(lambda: outputs.append(run_filter(call, backend)))  # noqa: B023
        backward = flops(lambda: outputs[0].sum().backward())  # noqa: B023
        assert (forward / ONE_PRODUCT, backward / ONE_PRODUCT) == products


def test_twicing_is_not_free_in_a_model_on_the_default_path() -> None:
    """The models differ by one more fused call a layer, forward, and in nothing else."""
    ids = token_ids(batch=2, length=16)
    plain, twice = (ImgProcGPT2LMHeadModel(gpt2_config(preset)).eval() for preset in ("softmax", "twicing"))
    twice.config.filter_backend = "sdpa"
    twice.load_state_dict(copy.deepcopy(plain.state_dict()))
    config = plain.config
    attention = 2 * 2 * 2 * 16**2 * config.n_embd  # 2 products of 2 N^2 d, batch 2
    with torch.no_grad():
        more = flops(lambda: twice(ids)) - flops(lambda: plain(ids))
    assert more == config.n_layer * attention


def test_the_triton_operator_is_counted_forward_and_backward() -> None:
    """By its formulas, on tensors without data: the kernels need a GPU."""
    with FakeTensorMode():
        query, key, value = (torch.empty(BATCH, HEADS, LENGTH, WIDTH) for _ in range(3))
        nothing, options = (None,) * 6, (0, 0, 0.25, False, True, "auto")
        forward = flops(lambda: torch.ops.hf_imgproc_attn.fused_filter(query, key, value, *nothing, *options))
        saved = torch.ops.hf_imgproc_attn.fused_filter(query, key, value, *nothing, *options)
        backward = flops(
            lambda: torch.ops.hf_imgproc_attn.fused_filter_backward(
                saved[0], query, key, value, *nothing, *saved, *options, False, False
            )
        )
    assert fused.fused_forward is not None
    assert (forward / ONE_PRODUCT, backward / ONE_PRODUCT) == (3, 7)


def test_formulas_are_registered_once_and_those_of_torch_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy of the code, which came with a checkpoint, finds them there."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def of_torch(*args: Any, **kwargs: Any) -> int:
        return 1

    monkeypatch.setitem(flop_registry, operator, of_torch)
    register_formulas()
    assert flop_registry[operator] is of_torch
