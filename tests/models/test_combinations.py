"""Which values of the axes go together: every pair of values of two axes either works on both backbones or is refused.

"Works" is a training step with finite, non-zero gradients for all parameters, the same with both back-ends in float64,
and for text the same logits by steps through a cache, with left padding. The combinations are derived from the tables
of the package, so that a new value is covered, or its pairs are entered in ``REFUSED``.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from hf_imgproc_attn.models.spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    FEEDBACKS,
    GATES,
    MAX_BOOSTING_STEPS,
    NORMALISATIONS,
    POSITION_KERNELS,
    RESIDUALS,
    STEPPED_BOOSTINGS,
)
from tests.models.helpers import GPT2, VIT, logits_in_steps, sharpen_
from tests.models.variants import IMPLEMENTATIONS, assert_same_gradients, gradients, images, pad, token_ids

Fields = dict[str, Any]
AXES: dict[str, tuple[str, ...]] = {
    "position_kernel": POSITION_KERNELS,
    "boosting": BOOSTINGS,
    "content_kernel": CONTENT_KERNELS,
    "residual": RESIDUALS,
    "feedback": FEEDBACKS,
    "gate": GATES,
    "normalisation": NORMALISATIONS,
}
REFUSED_PAIRS: list[tuple[Fields, str]] = [
    (
        {"content_kernel": "elliptical", "position_kernel": "rotary"},
        "'elliptical' cannot be combined with",
    ),
    ({"position_kernel": "forget", "normalisation": "sinkhorn"}, "needs attention with"),
    ({"boosting": "delta", "normalisation": "sinkhorn"}, "needs attention with"),
    (
        {"content_kernel": "gaussian", "normalisation": "softpick"},
        "normalisation 'softpick' cannot be combined with",
    ),
]
REFUSED: list[tuple[Fields, str]] = [
    *REFUSED_PAIRS,
    (
        {"normalisation": "sinkhorn", "sinkhorn_iterations": 0},
        "sinkhorn_iterations must be an integer from 1 to 64|later",
    ),
    ({"normalisation": "sink", "sinkhorn_iterations": 3}, "sinkhorn_iterations needs normalisation 'sinkhorn'"),
    ({"normalisation": ["sink"] * 3}, "normalisation as a list must have one value for each of the 2 layers"),
    ({"content_kernel": ["gaussian", "elliptical"], "position_kernel": ["none", "rotary"]}, "cannot be combined"),
    ({"content_kernel": ["elliptical", "gaussian"]}, "'elliptical' has no effect in layer 0"),
    ({"content_kernel": ["gaussian"] * 3}, "content_kernel as a list must have one value for each of the 2 layers"),
    ({"position_kernel": ["additive", "none"]}, "must be used by all layers or none"),
    ({"position_kernel": ["gaussian"] * 3}, "position_kernel as a list must have one value for each of the 2 layers"),
    ({"position_kernel": "rotary", "hidden_size": 6, "num_attention_heads": 2}, "must be divisible by"),
    ({"share_position_projections": True}, "needs position_kernel 'untied'"),
    ({"boosting": ["none"] * 3}, "boosting as a list must have one value for each of the 2 layers"),
    ({"boosting": ["none", "twicing"], "boosted_layers": [1]}, "boosted_layers must be None when boosting"),
    ({"boosting": "none", "boosted_layers": [1]}, "boosted_layers needs a boosting other than 'none'"),
    *(
        ({"boosting": boosting, "boosting_steps": 2}, "boosting_steps has no effect with boosting=")
        for boosting in BOOSTINGS
        if boosting not in STEPPED_BOOSTINGS
    ),
    *(
        ({"boosting": boosting, "boosting_steps": steps}, "boosting_steps must be an integer >= 1 and <=")
        for boosting, steps in itertools.product(STEPPED_BOOSTINGS, (0, MAX_BOOSTING_STEPS + 1))
    ),
    ({"boosting": "sos", "boosting_steps": [2, MAX_BOOSTING_STEPS + 1]}, "boosting_steps must be an integer"),
    ({"residual": ["standard", "sos"]}, "residual"),
    ({"feedback": ["none", "pid"]}, "feedback"),
    *(({"residual": scheme, "num_hidden_layers": 1}, "num_hidden_layers must be >= 2") for scheme in RESIDUALS[1:]),
    *(({"feedback": scheme, "num_hidden_layers": 1}, "num_hidden_layers must be >= 2") for scheme in FEEDBACKS[1:]),
    ({"content_kernel": "elliptical", "num_hidden_layers": 1}, "num_hidden_layers must be >= 2"),
    ({"feedback": "pid", "neutreno_lambda": 0.5}, "neutreno_lambda needs feedback='neutreno'"),
    ({"feedback": "neutreno", "pid_gains": [1.0, 0.0, 0.0]}, "pid_gains needs feedback='pid'"),
    *(
        ({"feedback": "neutreno", "neutreno_lambda": value}, "neutreno_lambda must be a finite number")
        for value in (float("nan"), float("inf"), -float("inf"))
    ),
    *(
        ({"feedback": "pid", "pid_gains": gains}, "pid_gains must be three finite numbers")
        for gains in ([0.5, float("nan"), 0.1], [float("inf"), 0.0, 0.0], [0.5, 0.1], [0.1] * 4)
    ),
]


def is_refused(fields: Fields) -> bool:
    """Whether the fields, one value an axis, contain a refused pair."""
    return any(pair.items() <= fields.items() for pair, _ in REFUSED_PAIRS)


def pairs_of(fields: Fields) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(fields.items(), 2)}


def covering_rows() -> list[Fields]:
    """Few combinations of all axes in which every pair that works occurs: greedily, around the two longest axes."""
    names, sizes = list(AXES), [len(values) for values in AXES.values()]
    open_pairs = {
        (one, other): np.array([[not is_refused({left: a, right: b}) for b in AXES[right]] for a in AXES[left]])
        for (one, left), (other, right) in itertools.combinations(enumerate(names), 2)
    }
    works = {pair: table.copy() for pair, table in open_pairs.items()}
    rest = np.array(list(itertools.product(*map(range, sizes[2:]))))
    rows = []
    for start in itertools.product(*map(range, sizes[:2])):
        candidates = np.column_stack([np.broadcast_to(start, (len(rest), 2)), rest])
        cells = {(one, other): (candidates[:, one], candidates[:, other]) for one, other in works}
        fine = np.all([table[cells[pair]] for pair, table in works.items()], axis=0)
        new = np.sum([table[cells[pair]] for pair, table in open_pairs.items()], axis=0)
        best = candidates[np.argmax(np.where(fine, new, -1))]
        for one, other in works:
            open_pairs[one, other][best[one], best[other]] = False
        rows.append({name: AXES[name][value] for name, value in zip(names, best, strict=True)})
    for (one, other), table in open_pairs.items():  # what the greedy choice has left over
        for a, b in np.argwhere(table):
            pair = {names[one]: AXES[names[one]][a], names[other]: AXES[names[other]][b]}
            rows.append(
                {name: pair.get(name, "none" if name == "position_kernel" else AXES[name][0]) for name in names}
            )
    assert not any(map(is_refused, rows))
    return rows


def in_turn(values: tuple[str, ...]) -> list[list[str]]:
    """Lists for two layers in which every value precedes another one and follows another one."""
    return [[left, right] for left, right in zip(values, (*values[1:], values[0]), strict=True)]


def layered_rows() -> list[Fields]:
    """Combinations whose two layers differ on every axis that can differ."""
    positions = in_turn(tuple(name for name in POSITION_KERNELS if name != "additive"))
    contents = [
        ["gaussian", "elliptical"],
        ["dot_product", "elliptical"],
        *itertools.permutations(CONTENT_KERNELS[:2]),
    ]
    rows = []
    for index, boosting in enumerate(in_turn(BOOSTINGS)):
        position = positions[index % len(positions)]
        # Elliptical in the second layer, but where that turns its features.
        content = list(contents[index % 4] if position[1] != "rotary" else contents[2 + index % 2])
        rows.append({"content_kernel": content, "position_kernel": position, "boosting": boosting})
    steps = {"boosting": ["sos", "diffusion"], "boosting_steps": [3, 2]}
    return [*rows, steps, {"boosting": ["twicing", "learned"], "boosting_steps": [3, 1]}]


EXTRA: list[Fields] = [
    {"boosting": "gradient_boosted", "boosted_layers": [-1], "position_kernel": "untied", "feedback": "pid"},
    {"boosting": "learned", "boosted_layers": [0], "share_position_projections": True, "position_kernel": "untied"},
    {"boosting": "gradient_boosted", "content_kernel": "elliptical", "position_kernel": "alibi", "residual": "osher"},
    {"boosting": "osher", "boosting_steps": 4, "feedback": "neutreno", "neutreno_lambda": -0.5, "residual": "sos"},
]
WORKS = [*covering_rows(), *layered_rows(), *EXTRA]
SIZES: dict[str, Fields] = {
    "gpt2": {**GPT2, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 12},
    "vit": {**VIT, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 20},
}


def name_of(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return None
    words = ("/".join(map(str, value)) if isinstance(value, list) else str(value) for value in fields.values())
    return "-".join(words)


def config_of(backbone: str, fields: Fields, **more: Any) -> Any:
    config_class = ImgProcGPT2Config if backbone == "gpt2" else ImgProcViTConfig
    return config_class(**{**SIZES[backbone], **fields, **more})


def build(backbone: str, fields: Fields, implementation: str) -> Any:
    """A sharp model in float64 whose bandwidths are learned: no layer is the stock one."""
    model_class = ImgProcGPT2LMHeadModel if backbone == "gpt2" else ImgProcViTForImageClassification
    if backbone == "gpt2" and fields.get("normalisation") == "sinkhorn":  # refused in a causal model; the ViT has it
        fields = {**fields, "normalisation": "softmax"}
    positions = fields.get("position_kernel", ())
    if backbone == "vit" and "forget" in positions:  # refused without a causal mask; the GPT-2 has it
        names = [positions] if isinstance(positions, str) else positions
        plain = ["none" if name == "forget" else name for name in names]
        fields = {**fields, "position_kernel": plain[0] if isinstance(positions, str) else plain}
    boosters = fields.get("boosting", ())
    if backbone == "vit" and "delta" in boosters:  # likewise
        names = [boosters] if isinstance(boosters, str) else boosters
        other = ["learned" if name == "delta" else name for name in names]
        fields = {**fields, "boosting": other[0] if isinstance(boosters, str) else other}
    config = config_of(backbone, fields, learn_bandwidths=True, attn_implementation=implementation)
    return sharpen_(model_class(config), std=1.5).double()


def loss_of(model: Any, backbone: str) -> torch.Tensor:
    if backbone == "gpt2":
        return model(token_ids(length=7), labels=token_ids(length=7)).loss
    states = model.vit(images().double()).last_hidden_state
    # The class token has no position: patches count too, or the last layer's position parameters have no gradient.
    return model.classifier(states[:, 0]).logsumexp(-1).mean() + states[:, 1:].sin().mean()


def test_every_pair_of_values_works_or_is_refused() -> None:
    """Counted anew, from the tables."""
    covered = set().union(*(pairs_of(row) for row in covering_rows()))
    refused = {frozenset(pair.items()) for pair, _ in REFUSED_PAIRS}
    for left, right in itertools.combinations(AXES, 2):
        for pair in itertools.product(AXES[left], AXES[right]):
            key = frozenset(zip((left, right), pair, strict=True))
            assert (key in covered) != (key in refused), key


@pytest.mark.parametrize("fields", WORKS, ids=name_of)
@pytest.mark.parametrize("backbone", list(SIZES))
def test_it_works(backbone: str, fields: Fields) -> None:
    results = []
    for implementation in IMPLEMENTATIONS:
        model = build(backbone, fields, implementation).train()
        loss = loss_of(model, backbone)
        results.append((loss.detach(), gradients(model, loss)))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    torch.testing.assert_close(sdpa, eager, rtol=1e-11, atol=1e-12)
    assert_same_gradients(sdpa_gradients, eager_gradients)
    for name, gradient in eager_gradients.items():
        assert gradient.isfinite().all(), name
        # A key's bias adds the same number to a whole row of dot products, a query's one to a whole column.
        unseen = ("k_proj", "key", *(("q_proj", "query") if fields.get("normalisation") == "sinkhorn" else ()))
        assert gradient.abs().max() > 1e-9 or name.split(".")[-2] in unseen, f"{name} has no gradient"
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    after = loss_of(model, backbone)
    assert after.isfinite()
    assert after != loss


@torch.no_grad()
@pytest.mark.parametrize("fields", WORKS, ids=name_of)
def test_decoding_by_steps(fields: Fields) -> None:
    """One row is padded on the left; the second has a token less in front than it would have alone."""
    model, inputs = build("gpt2", fields, "sdpa").eval(), pad(token_ids(length=7), row=1, length=5, side="left")
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs, use_cache=False).logits[real]
    torch.testing.assert_close(logits_in_steps(model, inputs, (0, 4, 5, 7))[real], wanted, rtol=0, atol=1e-11)
    alone = model(token_ids(length=7)[1:, :5]).logits[0]
    torch.testing.assert_close(wanted[7:], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=name_of)
@pytest.mark.parametrize("backbone", list(SIZES))
def test_it_is_refused(backbone: str, fields: Fields, reason: str) -> None:
    """When the configuration is made, and, where fields were set one by one afterwards, when the model is built."""
    with pytest.raises(Exception, match=reason):
        config_of(backbone, fields)
    config = config_of(backbone, {})

    def set_one_by_one() -> None:
        for name, value in fields.items():
            setattr(config, name, value)
        (ImgProcGPT2LMHeadModel if backbone == "gpt2" else ImgProcViTForImageClassification)(config)

    with pytest.raises(Exception, match=reason):
        set_one_by_one()
