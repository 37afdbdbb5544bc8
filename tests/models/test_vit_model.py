"""ViT variants as whole models: the stock model where they should be it, and consistent with themselves elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification

from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTForImageClassification,
    ImgProcViTForMaskedImageModeling,
    ImgProcViTModel,
)
from tests.models.helpers import sharpen_
from tests.models.variants import (
    BOOSTED,
    IMPLEMENTATIONS,
    SOME_STOCK,
    VARIANTS,
    assert_same_gradients,
    averages,
    gradients,
    heads_by_hand,
    images,
    recorded_call,
    vit_config,
)
from tests.models.vit_cases import HEADS, SQUARE, some_patches

pytestmark = pytest.mark.both_back_ends

TOKENS = 16  # 5 x 3 patches and the class token


def build(
    variant: str = "softmax", implementation: str = "eager", **overrides: Any
) -> ImgProcViTForImageClassification:
    """A sharpened classifier in evaluation mode."""
    config = vit_config(variant, attn_implementation=implementation, **overrides)
    return sharpen_(ImgProcViTForImageClassification(config)).eval()


def build_double(variant: str, implementation: str = "sdpa", **overrides: Any) -> ImgProcViTForImageClassification:
    """The same in float64."""
    return build(variant, implementation, **overrides).double()


@contextmanager
def recorded(module: torch.nn.Module, what: str) -> Iterator[list[torch.Tensor]]:
    """Collect the first input or the output of a module during the block."""
    found: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(args[0] if what == "input" else output)

    handle = module.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------------------------------------
# Two back-ends
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("mask", ["none", "flat", "4d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_equals_sdpa(variant: str, mask: str) -> None:
    flat = torch.ones(2, TOKENS)
    flat[1, [3, 15]] = 0
    allowed = torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.7
    additive = torch.zeros(allowed.shape).double().masked_fill(~allowed, torch.finfo(torch.float64).min)
    attention_mask = {"none": None, "flat": flat, "4d": additive}[mask]
    results = []
    for implementation in IMPLEMENTATIONS:
        model = build_double(variant, implementation)
        states = model.vit(images().double(), attention_mask=attention_mask).last_hidden_state
        logits = model.classifier(states[:, 0])
        # Patches count too: the class token has no position, so its loss alone leaves the last layer's unused.
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])) + states[:, 1:].sin().mean()
        results.append((states, gradients(model, loss)))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    # Stock ViT layers compute their softmax in float32 under eager, whatever the model's precision.
    exact = variant not in SOME_STOCK
    torch.testing.assert_close(
        eager, sdpa, **({"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-5, "atol": 1e-5})
    )
    assert_same_gradients(eager_gradients, sdpa_gradients, **({} if exact else {"rtol": 1e-4, "atol": 1e-4}))
    # A key's bias adds the same number to a whole row of dot products.
    flat_directions = {name for name, value in sdpa_gradients.items() if value.abs().max() < 1e-12}
    assert {name.split(".")[-2] for name in flat_directions} <= {"k_proj", "key"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_of_another_width_than_the_hidden_size_says(variant: str) -> None:
    if "gradient_boosted" in {spec.boosting for spec in vit_config(variant).layer_specs}:
        with pytest.raises(ValueError, match=r"'gradient_boosted' subtracts .* hidden_size = 20, got 4 \* 8"):
            build(variant, head_dim=8)
        return
    eager, sdpa = (build(variant, name, head_dim=8)(images()).logits for name in IMPLEMENTATIONS)
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-4)


@pytest.mark.both_back_ends(False)  # the dense path's mask is another one
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", BOOSTED)
def test_attention_dropout_draws_one_mask_for_all_passes(variant: str, implementation: str) -> None:
    model = build_double(variant, implementation, attention_probs_dropout_prob=0.3).train()
    torch.manual_seed(3)
    got = model(images().double()).logits
    torch.manual_seed(3)
    model.set_attn_implementation("eager")
    wanted = model(images().double()).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 if variant in SOME_STOCK else 1e-9)
    assert (got - model.eval()(images().double()).logits).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------------------------
# Attentions and hidden states
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_are_the_operator_that_multiplies_v(variant: str, masked: bool) -> None:
    model = build_double(variant, "eager")
    mask = torch.ones(2, TOKENS)
    if masked:
        mask[1, [3, 15]] = 0
    tolerance = 1e-5 if variant in SOME_STOCK else 1e-12
    output, calls = recorded_call(model, images().double(), attention_mask=mask, output_attentions=True)
    heads, names = model.config.num_attention_heads, [f"vit.layers.{layer}.attention" for layer in range(3)]
    assert len(output.attentions) == model.config.num_hidden_layers
    values = [calls[f"{name}.v_proj"].output.view(2, TOKENS, heads, -1).transpose(1, 2) for name in names]
    seen = mask[1].bool()
    for layer, (name, operator) in enumerate(zip(names, output.attentions, strict=True)):
        spec = model.config.layer_specs[layer]
        rounds = (spec.boosting_steps,) if spec.boosting == "gradient_boosted" else ()
        assert operator.shape == (2, *rounds, heads, TOKENS, TOKENS)
        maps = operator.view(2, -1, heads, TOKENS, TOKENS)
        sums = maps.sum(-1)
        if averages(spec):
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=tolerance)
        wanted, mixed = heads_by_hand(model.config, layer, maps, values, calls, name), calls[f"{name}.o_proj"].input
        torch.testing.assert_close(wanted[0], mixed[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(wanted[1, seen], mixed[1, seen], rtol=0, atol=tolerance)
        if masked:
            assert maps[1][..., seen, :][..., ~seen].abs().sum() == 0


@pytest.mark.parametrize(("preset", "plain"), [("twicing", "softmax"), ("bilateral_twicing", "bilateral")])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_boosted_attentions_are_the_polynomial_of_the_plain_ones(preset: str, plain: str, steps: int) -> None:
    boosted, smooth = build_double(preset, "eager", boosting_steps=steps), build_double(plain, "eager")
    smooth.load_state_dict(boosted.state_dict())
    matrix, operator = (model(images().double(), output_attentions=True).attentions[0] for model in (smooth, boosted))
    identity = torch.eye(TOKENS, dtype=matrix.dtype)
    polynomial = identity - torch.matrix_power(identity - matrix, steps)
    torch.testing.assert_close(operator, polynomial, rtol=0, atol=1e-5 if plain == "softmax" else 1e-12)


def test_gaussian_attentions_decay_with_the_distance_on_the_grid() -> None:
    """With equal content, log A_ij + |p_i - p_j|^2 / h^2 is the same number for all patches j of a row."""
    model = build_double("bilateral_gaussian", "eager")
    blank = torch.zeros(1, 2, 20, 12, dtype=torch.float64)
    with torch.no_grad():
        operator = model(blank, output_attentions=True).attentions[0][0]
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(3.0), indexing="ij")
    grid = torch.stack((rows.flatten(), columns.flatten()), -1).double()
    squared = (grid[:, None] - grid[None]).square().sum(-1)
    bandwidth = model.vit.layers[0].attention.filter.scalar_bias.position_log_bandwidth.exp()
    constant = operator[:, 1:, 1:].log() + squared / bandwidth.view(-1, 1, 1) ** 2
    torch.testing.assert_close(constant, constant[..., :1].expand_as(constant), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["untied", "gaussian"])
def test_class_token_scalars_are_the_position_logits_of_the_class_token(kernel: str) -> None:
    """To the token, from it, to itself: raising one by log 2 doubles those odds and no others in the first layer."""
    model = build_double("softmax", "eager", position_kernel=kernel)

    def odds() -> torch.Tensor:
        with torch.no_grad():
            matrix = model(images().double(), output_attentions=True).attentions[0]
        return torch.stack((matrix[:, :, 5, 0] / matrix[:, :, 5, 7], matrix[:, :, 0, 5] / matrix[:, :, 0, 0]))

    before = odds()
    scalars = model.vit.layers[0].attention.filter.scalar_bias.class_token
    for column, factors in enumerate(([2.0, 1.0], [1.0, 2.0], [1.0, 0.5])):
        with torch.no_grad():
            scalars[:, column] += torch.log(torch.tensor(2.0))
        after = odds()
        expected = torch.tensor(factors, dtype=torch.float64).view(2, 1, 1).expand_as(after)
        torch.testing.assert_close(after / before, expected, rtol=1e-6, atol=0)
        before = after


def test_attentions_under_sdpa_are_what_the_stock_model_gives() -> None:
    """Nothing, with a line in the log."""
    for model in (build("softmax", "sdpa"), build("twicing", "sdpa"), build("mixed", "sdpa")):
        assert not model(images(), output_attentions=True).attentions


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_return_dict_false(variant: str) -> None:
    model = build(variant, "eager")
    inputs = {"labels": torch.tensor([0, 2]), "output_hidden_states": True, "output_attentions": True}
    wanted = model(images(), **inputs)
    assert [states.shape for states in wanted.hidden_states] == [(2, TOKENS, 20)] * 4
    with recorded(model.vit.layers[1], "input") as second, recorded(model.vit.layernorm, "input") as last:
        loss, logits, hidden_states, attentions = model(images(), **inputs, return_dict=False)
    assert torch.equal(hidden_states[1], second[0])
    assert torch.equal(hidden_states[3], last[0])
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(logits, wanted.logits)
    for got, states in ((hidden_states, wanted.hidden_states), (attentions, wanted.attentions)):
        assert all(torch.equal(left, right) for left, right in zip(got, states, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Positions and image sizes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_patches_know_where_they_are(variant: str) -> None:
    """Exchanging two patches of the image changes the class token's output; not in a model without positions."""
    model = build_double(variant)
    sees_positions = any(spec.position_kernel != "none" for spec in model.config.layer_specs)
    pixels = images().double()
    swapped = pixels.clone()
    swapped[..., :4, :4], swapped[..., 16:, 8:] = pixels[..., 16:, 8:], pixels[..., :4, :4]
    difference = (model(swapped).logits - model(pixels).logits).abs().max()
    assert difference > 1e-3 if sees_positions else difference < 1e-10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gaussian_positions_do_not_see_a_mirror_and_a_shift_of_the_grid(implementation: str) -> None:
    """Distances are all that counts: mirrored patch order leaves the class token as it is."""
    model = build_double("bilateral_gaussian", implementation)
    pixels = images().double()
    patches = pixels.unflatten(2, (5, 4)).unflatten(4, (3, 4))
    for axis in (2, 4):
        mirrored = patches.flip(axis).flatten(4, 5).flatten(2, 3)
        torch.testing.assert_close(model(mirrored).logits, model(pixels).logits, rtol=0, atol=1e-10)
    turned = patches.transpose(2, 4).flatten(4, 5).flatten(2, 3)
    rotated = model(turned, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(rotated, model(pixels).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["untied", "gaussian", "none"])
@pytest.mark.parametrize("size", [(20, 12), (12, 20), (40, 24), (8, 32), (22, 15)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_image_sizes_with_interpolation(size: tuple[int, int], kernel: str, implementation: str) -> None:
    model = build(implementation=implementation, position_kernel=kernel)
    pixels = images(height=size[0], width=size[1])
    states = model.vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert states.shape == (2, 1 + (size[0] // 4) * (size[1] // 4), 20)
    assert states.isfinite().all()
    if size == (20, 12):
        assert torch.equal(states, model.vit(pixels).last_hidden_state)


def test_additive_interpolation_of_the_configured_size_is_no_interpolation() -> None:
    """Also where the image is not square."""
    model = build("softmax")
    assert torch.equal(model(images(), interpolate_pos_encoding=True).logits, model(images()).logits)


def resized_by_hand(table: torch.Tensor, trained: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """The added position of every patch, one feature after the other, rows in turn, behind that of the class token."""
    features = [
        torch.nn.functional.interpolate(
            table[0, 1:, feature].reshape(1, 1, *trained), size=wanted, mode="bicubic", align_corners=False
        ).flatten()
        for feature in range(table.shape[-1])
    ]
    return torch.cat((table[:, :1], torch.stack(features, dim=-1)[None]), dim=1)


@pytest.mark.parametrize("patch_size", [4, [4, 4], [2, 6]], ids=str)
@pytest.mark.parametrize("trained", [(2, 8), (8, 2), (4, 6), (5, 3)], ids=str)
@pytest.mark.parametrize("wanted", [(2, 8), (3, 7), (4, 4), (16, 1)], ids=str)
def test_added_positions_go_with_their_places_on_any_grid(
    wanted: tuple[int, int], trained: tuple[int, int], patch_size: Any
) -> None:
    """The stock function takes 2 x 8 for 4 x 4, stops at 4 x 6, and cannot divide by a list."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    model = build("twicing", image_size=[trained[0] * height, trained[1] * width], patch_size=patch_size)
    embeddings, pixels = model.vit.embeddings, images(height=wanted[0] * height, width=wanted[1] * width)
    with torch.no_grad():
        tokens, _ = embeddings(pixels, interpolate_pos_encoding=True)
        table = embeddings.position_embeddings
        expected = torch.cat((embeddings.cls_token.expand(2, -1, -1), embeddings.patch_embeddings(pixels)), dim=1)
        torch.testing.assert_close(tokens, expected + resized_by_hand(table, trained, wanted))
        assert model(pixels, interpolate_pos_encoding=True).logits.isfinite().all()


def test_softmax_on_a_square_grid_interpolates_to_images_that_are_not(tmp_path: Any) -> None:
    """Where the stock function is right, ours is the same to the bit."""
    ours = build("softmax", **SQUARE)
    ours.save_pretrained(tmp_path)
    stock = ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for size in ((20, 12), (8, 32), (12, 12), (13, 14), (24, 24)):
        pixels = images(height=size[0], width=size[1])
        expected = stock(pixels, interpolate_pos_encoding=True).logits
        assert torch.equal(ours(pixels, interpolate_pos_encoding=True).logits, expected)


def test_untied_interpolation_is_bicubic_over_the_grid() -> None:
    """Of the 5 x 3 table, rows by columns; class token apart."""
    model = build("bilateral")
    table = model.vit.embeddings.position_embeddings
    assert table.shape == (1, 15, 20)
    grid = table.view(1, 5, 3, 20).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(grid, size=(10, 7), mode="bicubic", align_corners=False)
    other = build("bilateral", image_size=[40, 28])
    missing, unexpected = other.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.endswith("position_embeddings")},
        strict=False,
    )
    assert (missing, unexpected) == (["vit.embeddings.position_embeddings"], [])
    with torch.no_grad():
        other.vit.embeddings.position_embeddings.copy_(wide.permute(0, 2, 3, 1).flatten(1, 2))
    pixels = images(height=40, width=28)
    got, wanted = model(pixels, interpolate_pos_encoding=True).logits, other(pixels).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("patch_size", [4, [4, 6]])
@pytest.mark.parametrize("variant", ["bilateral", "bilateral_gaussian", "mixed"])
def test_patches_that_are_not_square(variant: str, patch_size: Any) -> None:
    model = build(variant, image_size=[20, 18], patch_size=patch_size)
    columns = 18 // (patch_size if isinstance(patch_size, int) else patch_size[1])
    states = model.vit(images(width=18)).last_hidden_state
    assert states.shape == (2, 1 + 5 * columns, 20)
    larger = model.vit(images(height=24, width=36), interpolate_pos_encoding=True).last_hidden_state
    assert larger.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_patch_is_not_seen(variant: str) -> None:
    """Its pixels may change; the class token and the other patches do not."""
    model = build_double(variant)
    pixels, mask = images().double(), torch.ones(2, TOKENS)
    mask[:, [1 + 3 * 2 + 1, 15]] = 0  # third row, second column; last patch
    changed = pixels.clone()
    changed[..., 8:12, 4:8] += 3.0
    changed[..., 16:, 8:] -= 2.0
    states, other = (model.vit(x, attention_mask=mask).last_hidden_state for x in (pixels, changed))
    torch.testing.assert_close(other[:, mask[0].bool()], states[:, mask[0].bool()], rtol=0, atol=1e-12)
    assert (model(changed).logits - model(pixels).logits).abs().max() > 1e-3


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_four_dimensional_masks_hide_what_the_flat_mask_hides(variant: str, kind: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    flat = torch.ones(2, TOKENS)
    flat[1, [3, 15]] = 0
    allowed = flat.bool()[:, None, None, :].expand(2, 1, TOKENS, TOKENS)
    lowest = float("-inf") if kind == "infinite" else torch.finfo(torch.float64).min
    mask = allowed if kind == "boolean" else torch.zeros(allowed.shape).double().masked_fill(~allowed, lowest)
    wanted = model(images().double(), attention_mask=flat).logits
    torch.testing.assert_close(model(images().double(), attention_mask=mask).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_nothing_give_no_nan(variant: str, implementation: str) -> None:
    model = build(variant, implementation)
    flat = torch.ones(2, TOKENS)
    flat[0] = 0
    some = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    some[0, 0, 3] = some[0, 0, 0] = False
    floats = [torch.zeros(some.shape).masked_fill(~some, low) for low in (torch.finfo(torch.float32).min, -torch.inf)]
    alone = model(images()[1:]).logits
    for mask in (flat, some, *floats):
        output = model(images(), attention_mask=mask, labels=torch.tensor([1, 2]))
        assert output.logits.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())
        torch.testing.assert_close(output.logits[1:], alone, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("head", ["classifier", "masked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_lower_the_loss(variant: str, head: str) -> None:
    torch.manual_seed(0)
    model = HEADS[head][1](vit_config(variant, **SQUARE)).train()
    extra = {"classifier": {"labels": torch.tensor([2, 0])}, "masked": {"bool_masked_pos": some_patches()}}[head]
    pixels = images(height=12)
    if head == "masked":
        pixels = 0.1 * pixels + 2.0  # something that can be learned in a few steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = model(pixels, **extra).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_patches_are_hidden_from_the_masked_image_model(variant: str) -> None:
    model = sharpen_(ImgProcViTForMaskedImageModeling(vit_config(variant, **SQUARE))).eval().double()
    pixels, hidden = images(height=12).double(), torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 4] = True
    changed = pixels.clone()
    changed[..., 4:8, 4:8] += 2.0
    outputs = [model(x, bool_masked_pos=hidden).reconstruction for x in (pixels, changed)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trained", "given"), [((8, 32), (8, 32)), ((20, 12), (22, 15)), ((12, 12), (16, 24))], ids=str
)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_masked_images_need_not_be_square(variant: str, trained: tuple[int, int], given: tuple[int, int]) -> None:
    """Every patch is reconstructed in its place, and the loss is the mean over the pixels of masked patches."""
    config = vit_config(variant, image_size=list(trained), patch_size=[4, 4])
    model = sharpen_(ImgProcViTForMaskedImageModeling(config)).eval()
    rows, columns = given[0] // 4, given[1] // 4
    pixels, mask = images(height=given[0], width=given[1]), torch.zeros(2, rows * columns, dtype=torch.bool)
    mask[0, columns - 1] = mask[1, columns] = True  # the end of the first row, the beginning of the second
    output = model(pixels, bool_masked_pos=mask, interpolate_pos_encoding=True)
    assert output.reconstruction.shape == (2, 2, 4 * rows, 4 * columns)
    tokens = model.vit(pixels, bool_masked_pos=mask, interpolate_pos_encoding=True).last_hidden_state
    patch = model.decoder(tokens[1, 1 + columns].view(1, -1, 1, 1))[0]
    torch.testing.assert_close(output.reconstruction[1, :, 4:8, :4], patch)
    errors = (
        (output.reconstruction[0, :, :4, -4:] - pixels[0, :, :4, 4 * columns - 4 : 4 * columns]).abs(),
        (output.reconstruction[1, :, 4:8, :4] - pixels[1, :, 4:8, :4]).abs(),
    )
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())
    assert model(pixels, interpolate_pos_encoding=True).loss is None


def test_masks_that_do_not_fit_are_refused() -> None:
    model = ImgProcViTForMaskedImageModeling(vit_config())
    with pytest.raises(ValueError, match=r"one value for each of 5 x 3 patches, shape \(2, 15\), got \(2, 16\)"):
        model(images(), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    model = ImgProcViTForMaskedImageModeling(vit_config(patch_size=[4, 2]))
    with pytest.raises(ValueError, match=r"patch_size must be encoder_stride .* got patch_size=\[4, 2\]"):
        model(images(), bool_masked_pos=torch.zeros(2, 30, dtype=torch.bool))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pooler_is_optional(variant: str) -> None:
    with_pooler = sharpen_(ImgProcViTModel(vit_config(variant))).eval()
    without = ImgProcViTModel(vit_config(variant), add_pooling_layer=False).eval()
    without.load_state_dict({k: v for k, v in with_pooler.state_dict().items() if not k.startswith("pooler")})
    output = with_pooler(images())
    assert output.pooler_output.shape == (2, 20)
    assert without(images()).pooler_output is None
    assert torch.equal(without(images()).last_hidden_state, output.last_hidden_state)
