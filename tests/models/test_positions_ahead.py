"""What decoding steps make once for several of them, and what they multiply at once, changes no logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models import backend_reference, backend_row, modeling_imgproc_gpt2
from hf_imgproc_attn.models.cache_ahead import POSITIONS_AHEAD, KnownAhead, upcoming_positions
from hf_imgproc_attn.models.kernel_position import UntiedPositions

PROMPT, LENGTH = 4, 40


def build(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = ImgProcGPT2Config.from_preset(
        "bilateral", n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=LENGTH, **fields
    )
    model = ImgProcGPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def text(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def projected(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of the last layer's projections has had."""
    counts: list[int] = []
    projection = model.transformer.h[-1].attn.filter.position_projection
    forward = projection.forward
    monkeypatch.setattr(projection, "forward", lambda states: counts.append(states.shape[1]) or forward(states))
    return counts


def steps(model: Any, ids: torch.Tensor, cache: Any, first: int, **given: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens from ``first`` on, one by one."""
    logits = []
    for place in range(first, ids.shape[1]):
        own = {name: x[:, : place + 1] if "mask" in name else x[:, place : place + 1] for name, x in given.items()}
        logits.append(model(ids[:, place : place + 1], past_key_values=cache, **own).logits)
    return torch.cat(logits, dim=1)


def start(model: Any, ids: torch.Tensor, **given: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=cache, **{name: x[:, :PROMPT] for name, x in given.items()})
    return cache


@torch.no_grad()
def test_weights_are_read_for_many_positions_at_once(model: Any, projected: list[int]) -> None:
    """To the end of the table; the logits are those of all tokens at once."""
    ids = text()
    whole = model(ids, use_cache=False).logits
    found = steps(model, ids, start(model, ids), PROMPT)
    torch.testing.assert_close(found, whole[:, PROMPT:], rtol=0, atol=1e-12)
    assert projected == [LENGTH, PROMPT, POSITIONS_AHEAD, POSITIONS_AHEAD, LENGTH - PROMPT - 2 * POSITIONS_AHEAD]


@torch.no_grad()
def test_cropped_reordered_and_copied_caches_keep_them(model: Any, projected: list[int]) -> None:
    ids = text(length=12)
    cache = start(model, ids)
    steps(model, ids[:, :8], cache, PROMPT)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    other = torch.cat((ids[:, :6].flip(0), ids[:, 6:]), dim=1).repeat_interleave(2, dim=0)
    found = steps(model, other, cache, 6)
    assert projected == [PROMPT, POSITIONS_AHEAD]
    torch.testing.assert_close(found, model(other, use_cache=False).logits[:, 6:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("apart", "is_ahead"), [(3, True), (POSITIONS_AHEAD + 1, False)])
@torch.no_grad()
def test_rows_have_positions_of_their_own(model: Any, projected: list[int], apart: int, is_ahead: bool) -> None:
    """As with padding on the left; rows that are far apart have no next positions in common."""
    ids = text(length=22)
    places = torch.arange(22) + torch.tensor([[0], [apart]])
    whole = model(ids, position_ids=places, use_cache=False).logits
    found = steps(model, ids, start(model, ids, position_ids=places), PROMPT, position_ids=places)
    torch.testing.assert_close(found, whole[:, PROMPT:], rtol=0, atol=1e-12)
    assert (len(projected) <= 2 + 2) == is_ahead


@torch.no_grad()
def test_positions_that_jump_are_projected_anew(model: Any) -> None:
    ids, places = text(length=8), torch.tensor([[0, 1, 2, 3, 30, 5, 39, 6]])
    whole = model(ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=False).logits
    found = steps(model, ids, start(model, ids, position_ids=places), PROMPT, position_ids=places)
    torch.testing.assert_close(found, whole[:, PROMPT:], rtol=0, atol=1e-12)


CHANGING = ("norm.weight", "norm.bias", "query.weight", "key.weight", "table", "content", "position")


@pytest.mark.parametrize("name", CHANGING)
@torch.no_grad()
def test_weights_that_change_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a text: what was made with the others is not used again."""
    model, ids = build(), text(length=8)
    cache = start(model, ids)
    steps(model, ids[:, :6], cache, PROMPT)
    twin = copy.deepcopy(cache)
    before = steps(model, ids, copy.deepcopy(cache), 6)
    layer = model.transformer.h[1].attn.filter
    if name in ("content", "position"):
        weight = layer.scalar_bias.get_parameter(f"{name}_log_bandwidth")
    else:
        weight = model.transformer.wpe.weight if name == "table" else layer.position_projection.get_parameter(name)
    weight.add_(torch.linspace(0, 1, weight.numel(), dtype=weight.dtype).view_as(weight))
    found = steps(model, ids, cache, 6)
    monkeypatch.setattr(modeling_imgproc_gpt2, "upcoming_positions", lambda *args: None)
    monkeypatch.setattr(KnownAhead, "scale", lambda self, *given: given[-1]())
    torch.testing.assert_close(found, steps(model, ids, twin, 6), rtol=0, atol=1e-12)
    assert (found - before).abs().max() > 1e-6


@torch.no_grad()
def test_scales_of_bandwidths_are_made_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in each layer, for all steps; what inference mode has made is not used outside it."""
    made: list[torch.Tensor] = []
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: made.append(x) or exp(x))
    ids = text(length=10)
    with torch.inference_mode():
        cache = start(model, ids)
        steps(model, ids[:, :7], cache, PROMPT)
    counts = [len(made)]
    steps(model, ids, cache, 7)
    counts.append(len(made))
    assert counts == [4, 8]


OF_CASES: dict[str, dict[str, Any]] = {
    "twicing": {"boosting": "twicing"},
    "fixed": {"learn_bandwidths": False},
    "given": {"learn_bandwidths": False, "content_bandwidth": 1.5, "position_bandwidth": [0.5, 2.0]},
}


@pytest.mark.parametrize("reads_rows", [True, False])
@pytest.mark.parametrize("case", ["plain", *OF_CASES, "padding", "beams", "static"])
@torch.no_grad()
def test_one_product_with_content_and_position(case: str, reads_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two products give; with padding, and where a cache keeps the two apart, they stay two."""
    model = build(**OF_CASES.get(case, {}))
    monkeypatch.setattr(backend_row, "_reads_rows_faster", lambda: reads_rows)
    ids, given = text(length=10), {}
    if case == "padding":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :2] = 0

    def decode() -> torch.Tensor:
        cache = start(model, ids, **given)
        if case == "static":
            cache = StaticCache(config=model.config, max_cache_len=10)
            model(ids[:, :PROMPT], past_key_values=cache)
        first = steps(model, ids[:, :7], cache, PROMPT, **{name: x[:, :7] for name, x in given.items()})
        if case == "beams":
            cache.reorder_cache(torch.tensor([0, 0]))
        return torch.cat((first, steps(model, ids, cache, 7, **given)), dim=1)

    joined: list[bool] = []
    joint = backend_reference.joint_logits

    def watched(*args: Any) -> torch.Tensor | None:
        logits = joint(*args)
        joined.append(logits is not None)
        return logits

    monkeypatch.setattr(backend_reference, "joint_logits", watched)
    found = decode()
    assert joined == [case not in ("padding", "static")] * (6 * 2)
    monkeypatch.setattr(UntiedPositions, "beside", lambda *args: None)
    torch.testing.assert_close(found, decode(), rtol=0, atol=1e-12)


@torch.no_grad()
def test_factors_side_by_side_are_made_once_and_again_when_one_changes() -> None:
    """Content's may be a number; what is known belongs to these very tensors."""
    known, query = KnownAhead(), torch.zeros(3, 2, 1, 5)
    content, place = torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([3.0, 4.0]).view(2, 1, 1)
    first = known.side_by_side(content, place, query)
    assert known.side_by_side(content, place, query) is first
    assert first[:, 0].tolist() == [[1.0] * 5 + [3.0] * 5, [2.0] * 5 + [4.0] * 5]
    assert known.side_by_side(content, place + 1, query)[:, 0, -1].tolist() == [4.0, 5.0]
    assert known.side_by_side(0.5, place, query)[:, 0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("rows", "columns", "batch"), [(1, 6, 2), (7, 1, 2), (4, 6, 2), (1, 6, 1), (1, 6, 0)])
def test_products_of_one_row_are_those_of_any(rows: int, columns: int, batch: int) -> None:
    """Also of rows in a longer buffer, of turned ones, and with gradients; a batch that is shared is repeated."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, 3, rows + 2, 5, generator=generator, dtype=torch.float64)[:, :, :rows].requires_grad_()
    buffer = torch.randn(2 if batch == 1 else batch, 3, columns + 4, 5, generator=generator, dtype=torch.float64)
    right = buffer[:, :, :columns].mT.requires_grad_()
    found, wanted = backend_row.heads_product(left, right), left @ right
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(x.square().sum(), (left, right)) for x in (found, wanted))
    for mine, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)


def test_nothing_is_made_ahead_where_it_could_not_be_used(model: Any, projected: list[int]) -> None:
    """Static caches keep no such rows; gradients are those of the step; of adapters nobody knows when they change."""
    ids = text(length=7)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(ids[:, :PROMPT], past_key_values=cache)
        steps(model, ids, cache, PROMPT)
    steps(model, ids, start(model, ids), PROMPT)
    assert projected == [PROMPT, 1, 1, 1] * 2
    table, place = model.transformer.wpe, torch.tensor([[3]])
    with torch.no_grad():
        assert upcoming_positions(place, table) is not None
        assert upcoming_positions(torch.tensor([[3, 4]]), table) is None
        assert upcoming_positions(place[:0], table) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert upcoming_positions(place, table) is None


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}])
def test_generated_texts_are_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding on the left."""
    model, ids = build(), text(length=6)[: 1 if "prompt_lookup_num_tokens" in options else 2]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    generated = []
    for ahead in (upcoming_positions, lambda *args: None):
        monkeypatch.setattr(modeling_imgproc_gpt2, "upcoming_positions", ahead)
        torch.manual_seed(3)
        generated.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, eos_token_id=None, **options)
        )
    assert torch.equal(*generated)
