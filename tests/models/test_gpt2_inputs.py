"""GPT-2: causality, padding, masks, positions, embeddings and heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2LMHeadModel,
)
from tests.models.gpt2_cases import HEADS, build, build_double, padded_batch
from tests.models.helpers import sharpen_
from tests.models.variants import (
    ELLIPTICAL,
    IMPLEMENTATIONS,
    VARIANTS,
    VOCABULARY,
    gpt2_config,
    gradients,
    pad,
    token_ids,
)

pytestmark = pytest.mark.both_back_ends

# --------------------------------------------------------------------------------------------------------------------
# Causality, padding, positions
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_changes_nothing_before_it(variant: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    ids = token_ids(batch=1, length=9)
    before = model(ids).logits
    for position in (0, 4, 8):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 7) % VOCABULARY
        difference = (model(changed).logits - before).abs().amax(-1)[0]
        assert difference[:position].sum() < 1e-12
        assert difference[position:].min() > 1e-6


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_for_real_tokens(variant: str, side: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    inputs = pad(token_ids(), row=1, length=6, side=side)
    alone = model(token_ids()[1:, :6]).logits[0]
    torch.testing.assert_close(
        model(**inputs).logits[1][inputs["attention_mask"][1].bool()], alone, rtol=0, atol=1e-10
    )
    boolean = model(**{**inputs, "attention_mask": inputs["attention_mask"].bool()}).logits
    torch.testing.assert_close(boolean, model(**inputs).logits)


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite", "one_row", "per_head"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_four_dimensional_masks_hide_what_the_flat_mask_hides(variant: str, kind: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    inputs = pad(token_ids(), row=1, length=6, side="right")
    if kind == "one_row":
        inputs = {name: value[1:] if name != "input_ids" else value for name, value in inputs.items()}
        inputs["input_ids"] = inputs["input_ids"][1:].expand(2, -1)
    allowed = torch.ones(9, 9).tril().bool() & inputs["attention_mask"].bool()[:, None, None, :]
    lowest = float("-inf") if kind == "infinite" else torch.finfo(torch.float64).min
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)
    masks = {
        "boolean": allowed,
        "additive": additive,
        "infinite": additive,
        "one_row": allowed,
        "per_head": allowed.expand(-1, model.config.n_head, -1, -1),
    }
    got = model(**{**inputs, "attention_mask": masks[kind]}).logits
    flat = {**inputs, "attention_mask": inputs["attention_mask"].expand(2, -1)}
    torch.testing.assert_close(got[:, :6], model(**flat).logits[:, :6], rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in (*ELLIPTICAL, "normalisations")])
def test_additive_mask_values_are_added_to_the_logits(variant: str, implementation: str) -> None:
    """Moderate values are a bias on the logits, as in the stock model: log 3 counts a key three times.

    Not so in the elliptical metric, where three copies of a token are three tokens, nor where weights are no
    multiples of exponentials.
    """
    plain = dict.fromkeys(("boosting_steps", "boosted_layers", "gradient_boosting_source"))
    model = build_double(variant, implementation, boosting="none", **plain)
    ids = token_ids(batch=1, length=6)
    tripled = torch.cat((ids[:, :1], ids[:, :1], ids), dim=1)
    allowed, all_allowed = torch.ones(6, 6).tril().bool(), torch.ones(8, 8).tril().bool()
    all_allowed[:3, :3] = True
    mask, all_mask = (
        torch.zeros(1, 1, *seen.shape).double().masked_fill(~seen, torch.finfo(torch.float64).min)
        for seen in (allowed, all_allowed)
    )
    mask[..., 0] += torch.log(torch.tensor(3.0, dtype=torch.float64))
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    wanted = model(tripled, attention_mask=all_mask, position_ids=positions).logits[:, 2:]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_do_not_see_each_other(variant: str, implementation: str) -> None:
    """position_ids that start again mean several texts in one row, as data collators without padding make them."""
    model = build_double(variant, implementation)
    ids = token_ids(batch=1, length=9)
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False).logits
    apart = torch.cat([model(part).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["additive", "untied"])
def test_position_ids_select_rows_of_the_table(kernel: str) -> None:
    model = build_double("softmax", position_kernel=kernel)
    order = torch.tensor([5, 0, 7, 23, 2, 2, 11, 3, 9])
    mask = torch.ones(2, 9)  # without one the library would take positions that jump for packed texts
    got = model(token_ids(), position_ids=order.unsqueeze(0), attention_mask=mask).logits
    with torch.no_grad():
        model.transformer.wpe.weight[:9] = model.transformer.wpe.weight[order]
    torch.testing.assert_close(got, model(token_ids()).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stretched_positions_are_a_narrower_gaussian(implementation: str) -> None:
    model = build_double("bilateral_gaussian", implementation)
    got = model(token_ids(), position_ids=torch.arange(9).unsqueeze(0) * 2, attention_mask=torch.ones(2, 9)).logits
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.filter.scalar_bias.position_log_bandwidth -= torch.log(torch.tensor(2.0))
    torch.testing.assert_close(got, model(token_ids()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", ["gaussian", "none"])
def test_relative_kernels_do_not_see_a_shift(kernel: str, implementation: str) -> None:
    model = build_double("softmax", implementation, position_kernel=kernel)
    mask = torch.ones(2, 9)
    shifted = model(token_ids(), position_ids=torch.arange(9).unsqueeze(0) + 40, attention_mask=mask).logits
    torch.testing.assert_close(shifted, model(token_ids()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["gaussian", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kernels_without_a_table_go_past_n_positions(kernel: str, implementation: str) -> None:
    model = build_double("softmax", implementation, position_kernel=kernel)
    assert model.transformer.wpe is None
    ids = token_ids(batch=1, length=60)
    whole = model(ids).logits
    torch.testing.assert_close(whole[:, :20], model(ids[:, :20]).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_position_ids_of_one_row_serve_every_row(variant: str) -> None:
    model = build(variant)
    positions = torch.arange(9).unsqueeze(0)
    wanted = model(token_ids(), position_ids=positions.expand(2, -1)).logits
    assert torch.equal(model(token_ids(), position_ids=positions).logits, wanted)
    assert torch.equal(model(token_ids()).logits, wanted)


# --------------------------------------------------------------------------------------------------------------------
# Other inputs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_may_be_given_in_place_of_tokens(variant: str) -> None:
    model = build(variant)
    embedded = model.transformer.wte(token_ids())
    wanted = model(token_ids()).logits
    assert torch.equal(model(inputs_embeds=embedded).logits, wanted)
    types = token_ids(seed=7)
    # The embeddings are added in another order.
    model = model.double()
    embedded = model.transformer.wte(token_ids())
    typed = model(token_ids(), token_type_ids=types).logits
    torch.testing.assert_close(typed, model(inputs_embeds=embedded + model.transformer.wte(types)).logits)
    assert (typed - wanted).abs().max() > 0.1


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 7])])
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_logits_to_keep(variant: str, keep: int | torch.Tensor) -> None:
    model = build(variant)
    rows = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    torch.testing.assert_close(model(token_ids(), logits_to_keep=keep).logits, model(token_ids()).logits[:, rows])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_nothing_give_no_nan(variant: str, implementation: str) -> None:
    """A row that is all padding, single queries without a key: finite forward and backward, the others untouched."""
    model = build(variant, implementation)
    ids = token_ids()
    flat = torch.ones(2, 9, dtype=torch.long)
    flat[0] = 0
    some = torch.ones(9, 9).tril().bool().repeat(2, 1, 1, 1)
    some[0, 0, 3] = some[0, 0, 8] = False
    some[1, 0, :, 5] = False
    some[1, 0, 5] = False
    floats = [torch.zeros(some.shape).masked_fill(~some, low) for low in (torch.finfo(torch.float32).min, -torch.inf)]
    alone = model(ids[1:]).logits[0]
    for mask in (flat, some, *floats):
        output = model(ids, attention_mask=mask, labels=ids)
        assert output.logits.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())
        if mask is flat:
            torch.testing.assert_close(output.logits[1], alone, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(output.logits[1, :5], alone[:5], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Embeddings, tying, heads
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resizing_the_vocabulary_keeps_the_old_logits(variant: str, tmp_path: Any) -> None:
    model = build(variant)
    wanted = model(token_ids()).logits
    model.resize_token_embeddings(VOCABULARY + 6)
    assert model.lm_head.weight is model.transformer.wte.weight
    got = model(token_ids()).logits
    torch.testing.assert_close(got[..., :VOCABULARY], wanted)
    assert got.shape[-1] == model.config.vocab_size == VOCABULARY + 6
    model.save_pretrained(tmp_path)
    implementation = model.config._attn_implementation
    again = ImgProcGPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again(token_ids()).logits, got)


def test_untied_embeddings_stay_apart(tmp_path: Any) -> None:
    model = build("bilateral", tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


@pytest.mark.sampled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", ["lm", "sequence", "token"])
def test_a_few_steps_lower_the_loss(head: str, variant: str) -> None:
    torch.manual_seed(0)
    _, our_class, options = HEADS[head]
    model = our_class(gpt2_config(variant, pad_token_id=0, **options)).train()
    inputs = padded_batch("right")
    labels = {
        "lm": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100),
        "sequence": torch.tensor([4, 2]),
        "token": token_ids() % 5,
    }[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.sampled
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sequence_classification_reads_the_last_real_token(variant: str, side: str) -> None:
    config = gpt2_config(variant, pad_token_id=0, num_labels=3)
    model = sharpen_(ImgProcGPT2ForSequenceClassification(config)).eval().double()
    inputs = pad(token_ids(), row=1, length=6, side=side)
    alone = model(token_ids()[1:, :6]).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone, rtol=0, atol=1e-10)
