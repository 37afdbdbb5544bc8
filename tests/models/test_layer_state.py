"""What travels from layer to layer: the package's schemes, and others that exist only here, on both backbones.

The expected values come from a forward pass written out below, which keeps the state in plain Python lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2LMHeadModel, ViTForImageClassification

from hf_imgproc_attn.models import spec_rules
from hf_imgproc_attn.models.boost_depth import FEEDBACK, RESIDUAL, LayerState
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2Block, ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification, ImgProcViTLayer
from tests.models.helpers import sharpen_, tiny_gpt2_config, tiny_vit_config
from tests.models.variants import heads_by_hand, recorded_call

pytestmark = pytest.mark.both_back_ends

TIGHT = {"rtol": 0, "atol": 1e-11}
Model = torch.nn.Module
Step = tuple[torch.Tensor, LayerState]
Residual = tuple[torch.Tensor, torch.Tensor, LayerState]

# --------------------------------------------------------------------------------------------------------------------
# Schemes that only the tests know
# --------------------------------------------------------------------------------------------------------------------


def pull_to_first(output: torch.Tensor, value: torch.Tensor, state: LayerState) -> Step:
    """A V_l + (V_0 - V_l) / 2, layer 0 plain."""
    if state.first_value is None:
        return output, state._replace(first_value=value)
    return output + 0.5 * (state.first_value - value), state


def three_terms(output: torch.Tensor, value: torch.Tensor, state: LayerState) -> Step:
    """A V_l + 0.3 e_l + 0.2 sum_{m <= l} e_m + 0.1 (V_{l-1} - V_l) with e_l = V_0 - V_l: every field of values."""
    if state.first_value is None:
        return output, state._replace(first_value=value, previous_value=value, feedback_sum=torch.zeros_like(value))
    error = state.first_value - value
    total = state.feedback_sum + error
    output = output + 0.3 * error + 0.2 * total + 0.1 * (state.previous_value - value)
    return output, state._replace(previous_value=value, feedback_sum=total)


def remainder(hidden: torch.Tensor, state: LayerState) -> Residual:
    """x + f(x_0 - x)."""
    return state.first_hidden - hidden, hidden, state


def opposed(hidden: torch.Tensor, state: LayerState) -> Residual:
    """f(x_0 + x) - x."""
    return state.first_hidden + hidden, -hidden, state


def accumulated(hidden: torch.Tensor, state: LayerState) -> Residual:
    """x + f(x_0 + sum_{1 <= m <= l} (x_0 - x_m))."""
    total = state.first_hidden - hidden
    if state.hidden_sum is not None:
        total = total + state.hidden_sum
    return state.first_hidden + total, hidden, state._replace(hidden_sum=total)


FEEDBACKS = {"pull_to_first": pull_to_first, "three_terms": three_terms}
RESIDUALS = {"remainder": remainder, "opposed": opposed, "accumulated": accumulated}
SCHEMES: list[dict[str, str]] = [
    {"feedback": "pull_to_first"},
    {"feedback": "three_terms"},
    {"residual": "remainder"},
    {"residual": "opposed"},
    {"residual": "accumulated"},
    {"feedback": "three_terms", "residual": "accumulated"},
]
OURS: list[dict[str, Any]] = [
    {"residual": "twicing"},
    {"residual": "sos"},
    {"residual": "osher"},
    {"feedback": "neutreno"},
    {"feedback": "neutreno", "neutreno_lambda": 1.3},
    {"feedback": "pid"},
    {"feedback": "pid", "pid_gains": [0.7, -0.3, 0.4], "residual": "osher"},
    {"feedback": "neutreno", "learn_feedback": True},
    {"feedback": "pid", "learn_feedback": True, "residual": "sos"},
]


def scheme_name(scheme: dict[str, Any]) -> str:
    return "+".join(str(value) for value in scheme.values()) or "none"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tables and the lists of allowed values: all that a new scheme has to touch."""
    for table, schemes in ((FEEDBACK, FEEDBACKS), (RESIDUAL, RESIDUALS)):
        for name, function in schemes.items():
            monkeypatch.setitem(table, name, function)
    monkeypatch.setattr(spec_rules, "FEEDBACKS", (*spec_rules.FEEDBACKS, *FEEDBACKS))
    monkeypatch.setattr(spec_rules, "RESIDUALS", (*spec_rules.RESIDUALS, *RESIDUALS))


# --------------------------------------------------------------------------------------------------------------------
# The same written out
# --------------------------------------------------------------------------------------------------------------------


def attention_input(scheme: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What the attention of the newest layer reads, given the inputs of all layers so far."""
    first, newest = inputs[0], inputs[-1]
    if scheme == "standard" or len(inputs) == 1:
        return newest
    if scheme in ("remainder", "twicing"):
        return first - newest
    if scheme in ("opposed", "sos"):
        return first + newest
    return first + sum(first - earlier for earlier in inputs[1:])


def skip(scheme: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What the attention of the newest layer is added to."""
    return -inputs[-1] if scheme in ("opposed", "sos") and len(inputs) > 1 else inputs[-1]


def head_output(attention: Model, output: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
    """What leaves the heads of the newest layer, given the values of all layers so far."""
    config, learned = attention.config, attention.filter.scalar_bias.feedback_gains
    scheme = config.feedback
    assert (learned is not None) == (config.learn_feedback and len(values) > 1)
    if scheme == "none" or len(values) == 1:
        return output
    errors = [values[0] - value for value in values[1:]]
    if learned is not None:
        terms = [errors[-1], sum(errors), errors[-1] - (errors[-2] if len(errors) > 1 else 0)]
        return torch.stack(
            [
                output[:, head] + sum(gain * term[:, head] for gain, term in zip(learned[head], terms, strict=False))
                for head in range(4)
            ],
            dim=1,
        )
    if scheme == "pull_to_first":
        return output + errors[-1] / 2
    if scheme == "neutreno":
        default = {"imgproc_gpt2": 0.4, "imgproc_vit": 0.6}[config.model_type]
        return output + (default if config.neutreno_lambda is None else config.neutreno_lambda) * errors[-1]
    if scheme == "pid":
        gains = config.pid_gains or [0.5, 0.05, 0.05]
        before = errors[-2] if len(errors) > 1 else 0
        return output + gains[0] * errors[-1] + gains[1] * sum(errors) + gains[2] * (errors[-1] - before)
    return output + 0.3 * errors[-1] + 0.2 * sum(errors) + 0.1 * (values[-2] - values[-1])


def filtered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boosted: bool, causal: bool) -> torch.Tensor:
    """A V or (2A - A^2) V with A of stock attention."""
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    matrix = logits.softmax(-1)
    return 2 * matrix @ value - matrix @ (matrix @ value) if boosted else matrix @ value


def heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(-1, (4, 5)).transpose(1, 2)


def gpt2_by_hand(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tiny GPT-2 with additive positions."""
    config, body = model.config, model.transformer
    hidden, inputs, values = body.wte(ids) + body.wpe.weight[: ids.shape[1]], [], []
    for block in body.h:
        inputs.append(hidden)
        query, key, value = map(
            heads, block.attn.c_attn(block.ln_1(attention_input(config.residual, inputs))).split(20, dim=-1)
        )
        values.append(value)
        output = head_output(block.attn, filtered(query, key, value, config.boosting == "twicing", True), values)
        hidden = skip(config.residual, inputs) + block.attn.c_proj(output.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return body.ln_f(hidden) @ body.wte.weight.T


def vit_by_hand(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of the tiny ViT with additive positions."""
    config, body = model.config, model.vit
    (hidden, _), inputs, values = body.embeddings(pixels), [], []
    for layer in body.layers:
        inputs.append(hidden)
        attention, normed = layer.attention, layer.layernorm_before(attention_input(config.residual, inputs))
        query, key, value = (
            heads(projection(normed)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        values.append(value)
        output = head_output(attention, filtered(query, key, value, config.boosting == "twicing", False), values)
        hidden = skip(config.residual, inputs) + attention.o_proj(output.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    return model.classifier(body.layernorm(hidden)[:, 0])


def ids() -> torch.Tensor:
    return torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def pixels() -> torch.Tensor:
    return torch.randn(2, 2, 20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


BACKBONES: dict[
    str, tuple[Callable[..., Any], type[Model], Callable[[], torch.Tensor], Callable[..., torch.Tensor]]
] = {
    "gpt2": (tiny_gpt2_config, ImgProcGPT2LMHeadModel, ids, gpt2_by_hand),
    "vit": (tiny_vit_config, ImgProcViTForImageClassification, pixels, vit_by_hand),
}


def build(backbone: str, preset: str = "softmax", implementation: str = "sdpa", **fields: Any) -> Model:
    """A sharp model in float64, in training mode (it has no dropout)."""
    config, model_class = BACKBONES[backbone][:2]
    model = model_class._from_config(config(preset, **fields), attn_implementation=implementation)
    return sharpen_(model.double(), seed=3).train()


def outcome(model: Model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every parameter."""
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-11) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max().clamp(min=1))
        torch.testing.assert_close(
            got[name] / scale, tensor / scale, msg=lambda t, n=name: f"{n}: {t}", rtol=0, atol=atol
        )


@pytest.fixture
def states() -> Iterator[list[tuple[torch.Tensor | None, ...]]]:
    """The state that every block returned, in order."""
    seen: list[tuple[torch.Tensor | None, ...]] = []

    def record(module: Model, arguments: Any, output: Any) -> None:
        if isinstance(module, ImgProcGPT2Block | ImgProcViTLayer):
            seen.append(tuple(output[1:]))

    handle = torch.nn.modules.module.register_module_forward_hook(record)
    yield seen
    handle.remove()


# --------------------------------------------------------------------------------------------------------------------
# The state travels
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", ["softmax", "twicing"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *OURS], ids=scheme_name)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_state_reaches_every_layer(backbone: str, scheme: dict[str, str], preset: str, implementation: str) -> None:
    """Logits and all gradients, those through the first layer's values too, are those of the written-out model."""
    model, given = build(backbone, preset, implementation, **scheme), BACKBONES[backbone][2]()
    expected = outcome(model, BACKBONES[backbone][3](model, given))
    # Layers without boosting and feedback run the stock code, and stock ViT's eager softmax is always in float32.
    stock_eager = backbone == "vit" and preset == "softmax" and implementation == "eager" and "feedback" not in scheme
    assert_same(outcome(model, model(given).logits), expected, atol=1e-6 if stock_eager else 1e-11)
    plain = build(backbone, preset, implementation)(given).logits
    assert (plain - expected["logits"]).abs().max() > 0.1, "the scheme changes nothing here"


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_what_the_state_holds(backbone: str, states: list[tuple[torch.Tensor | None, ...]]) -> None:
    """Tensors in the fields that the schemes use, of the documented shapes, the first ones unchanged to the end."""
    model, given = build(backbone, feedback="three_terms", residual="accumulated"), BACKBONES[backbone][2]()
    model(given)
    length = 9 if backbone == "gpt2" else 16
    shapes = LayerState(*[(2, length, 20)] * 2, *[(2, 4, length, 5)] * 3)
    assert len(states) == 3
    assert [state[1] is None for state in states] == [True, False, False]  # a sum over blocks from 1 on
    for state in map(LayerState._make, states):
        assert [tensor.shape for tensor in state if tensor is not None] == [
            torch.Size(shape) for shape, tensor in zip(shapes, state, strict=True) if tensor is not None
        ]
    first, last = LayerState._make(states[0]), LayerState._make(states[-1])
    assert last.first_hidden is first.first_hidden
    assert last.first_value is first.first_value
    assert not torch.equal(last.previous_value, first.previous_value)


@pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
@pytest.mark.parametrize("preset", ["softmax", "bilateral_twicing", "bilateral_gaussian"])
@pytest.mark.parametrize("scheme", [{}, SCHEMES[0], SCHEMES[-1], OURS[1], OURS[-1]], ids=scheme_name)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_gradient_checkpointing(backbone: str, scheme: dict[str, str], preset: str, reentrant: bool) -> None:
    """Equal outputs and gradients, and the layers did run twice."""
    model, given = build(backbone, preset, **scheme), BACKBONES[backbone][2]()
    expected = outcome(model, model(given).logits)
    # The older name is deprecated from Transformers 5.23 on, the newer one is not in 5.17.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    calls: list[int] = []
    for index, layer in enumerate(model.transformer.h if backbone == "gpt2" else model.vit.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    assert_same(outcome(model, model(given).logits), expected)
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]


@torch.no_grad()
@pytest.mark.parametrize("preset", ["softmax", "bilateral_twicing"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *OURS], ids=scheme_name)
def test_cached_decoding_with_state(scheme: dict[str, str], preset: str) -> None:
    """The state is that of the new tokens: chunks and steps give the logits of the full pass."""
    model = build("gpt2", preset, **scheme).eval()
    cache, outputs = DynamicCache(config=model.config), []
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        outputs.append(model(ids()[:, start:stop], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids()).logits, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_feedback_with_attentions(backbone: str) -> None:
    """The operator that is returned is A, without the feedback; asking for it changes nothing."""
    model, given = build(backbone, implementation="eager", feedback="pull_to_first"), BACKBONES[backbone][2]()
    output = model(given, output_attentions=True)
    torch.testing.assert_close(output.logits, model(given).logits, **TIGHT)
    assert len(output.attentions) == 3
    for operator in output.attentions:
        torch.testing.assert_close(operator.sum(-1), torch.ones_like(operator[..., 0]), **TIGHT)


def test_state_does_not_outlive_a_call() -> None:
    """Nothing is kept on modules: a second call with other tokens is not influenced by the first."""
    model = build("gpt2", feedback="three_terms", residual="accumulated")
    expected = model(ids()).logits
    model(ids().flip(0, 1))
    assert torch.equal(model(ids()).logits, expected)


@pytest.mark.parametrize(
    ("fields", "filled"),
    [
        ({"residual": "twicing"}, {"first_hidden"}),
        ({"residual": "sos"}, {"first_hidden"}),
        ({"residual": "osher"}, {"first_hidden", "hidden_sum"}),
        ({"feedback": "neutreno"}, {"first_value"}),
        ({"feedback": "pid"}, {"first_value", "previous_value", "feedback_sum"}),
        ({"content_kernel": "elliptical"}, {"previous_value"}),
        ({"content_kernel": "elliptical", "feedback": "neutreno"}, {"first_value", "previous_value"}),
    ],
)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_only_what_is_needed_travels(
    backbone: str, fields: dict[str, str], filled: set[str], states: list[tuple[torch.Tensor | None, ...]]
) -> None:
    """The other fields stay empty, so that nothing is kept alive or sent to another device in vain."""
    build(backbone, **fields)(BACKBONES[backbone][2]())
    state = LayerState._make(states[-1])._asdict()
    assert {name for name, tensor in state.items() if tensor is not None} == filled


@pytest.mark.parametrize("scheme", [OURS[4], OURS[-1]], ids=scheme_name)
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_the_first_layer_learns_from_what_later_layers_take_of_it(backbone: str, scheme: dict[str, Any]) -> None:
    """With its own output cut off, layer 0's value projection still has a gradient: through V_0 alone."""
    model = build(backbone, **scheme)
    layer = model.transformer.h[0] if backbone == "gpt2" else model.vit.layers[0]
    attention = layer.attn if backbone == "gpt2" else layer.attention
    output = attention.c_proj if backbone == "gpt2" else attention.o_proj
    output.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
    outcome(model, model(BACKBONES[backbone][2]()).logits)
    weight = attention.c_attn.weight[:, 40:] if backbone == "gpt2" else attention.v_proj.weight
    full = attention.c_attn.weight.grad[:, 40:] if backbone == "gpt2" else attention.v_proj.weight.grad
    assert full.shape == weight.shape
    assert full.abs().max() > 1e-3


def test_feedback_is_not_dropped_out() -> None:
    """What leaves the heads is A' V_l with the dropped A', which is returned, and the whole of the feedback."""
    model = build("gpt2", implementation="eager", feedback="neutreno", attn_pdrop=0.5)
    output, seen = recorded_call(model, ids(), output_attentions=True, use_cache=False)
    names = [f"transformer.h.{layer}.attn" for layer in range(3)]
    values = [heads(seen[f"{name}.c_attn"].output[..., 40:]) for name in names]
    for layer, (name, operator) in enumerate(zip(names, output.attentions, strict=True)):
        assert (operator.tril() == 0).double().mean() > 0.6
        wanted = heads_by_hand(model.config, layer, operator.unsqueeze(1), values, seen, name)
        torch.testing.assert_close(seen[f"{name}.c_proj"].input, wanted, **TIGHT)


# --------------------------------------------------------------------------------------------------------------------
# Without schemes nothing changes
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("preset", ["softmax", "bilateral_twicing"])
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_no_state_without_a_scheme(backbone: str, preset: str, states: list[tuple[torch.Tensor | None, ...]]) -> None:
    """No tensor is kept alive for nothing."""
    build(backbone, preset)(BACKBONES[backbone][2]())
    assert states == [(None,) * 5] * 3


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("backbone", "stock_class"), [("gpt2", GPT2LMHeadModel), ("vit", ViTForImageClassification)])
def test_stock_logits_without_a_scheme(backbone: str, stock_class: type[Model], implementation: str) -> None:
    """The plumbing costs no bit: the stock classes with the same weights give the same logits."""
    ours, given = build(backbone, "softmax", implementation).float(), BACKBONES[backbone][2]()
    given = given.float() if given.is_floating_point() else given
    config_class = stock_class.config_class
    fields = {name: value for name, value in ours.config.to_dict().items() if name != "model_type"}
    stock = stock_class._from_config(config_class(**fields), attn_implementation=implementation)
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(given).logits, stock.eval()(given).logits)
