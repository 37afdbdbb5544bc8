"""Filtered models are trained as stock ones: checkpointing, half precision, compiled, by the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_imgproc_attn import apply_filter
from tests.any_model.architectures import build, text

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

FILTERS: dict[str, dict[str, Any]] = {
    "learned": {"preset": "learned_twicing"},
    "delta": {"preset": "delta"},
    "neutreno": {"preset": "neutreno"},
    "pid": {"preset": "pidformer", "layers": [-2, -1]},
    "elliptical": {"preset": "elliptical", "boosting": "sos"},
    "positions": {"position_kernel": "alibi", "content_kernel": "gaussian", "learn_bandwidths": True},
}
COMPILED = ("delta", "elliptical", "positions", "pid")
"""Compiling takes seconds: without ``--full`` each kind of state and of kernels, but not two of a kind."""


def filtered(name: str, **fields: Any) -> Any:
    """A model whose own numbers have left the values at which they do nothing."""
    model: Any = apply_filter(build(name), **fields).train()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "scalar_bias" in key:
                value.add_(0.2)
    return model


def scalars(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "scalar_bias" in name}


def gradients(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=text(), labels=text(), **options).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", FILTERS)
def test_gradient_checkpointing_changes_nothing_or_is_refused(kind: str, use_reentrant: bool) -> None:
    model = filtered("llama", **FILTERS[kind])
    wanted = gradients(model)
    assert set(scalars(model)) <= set(wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if use_reentrant and (FILTERS[kind].get("preset") in ("neutreno", "pidformer") or kind == "elliptical"):
        with pytest.raises(ValueError, match="use gradient checkpointing with use_reentrant=False"):
            gradients(model)
    else:
        same(gradients(model), wanted)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in COMPILED else pytest.mark.full) for kind in FILTERS]
)
def test_a_compiled_model_has_the_same_gradients(kind: str) -> None:
    model = filtered("llama", **FILTERS[kind])
    wanted = gradients(model, use_cache=False)
    compiled: Any = torch.compile(model, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in gradients(compiled, use_cache=False).items()}
    same(found, wanted)


@pytest.mark.parametrize("kind", FILTERS)
def test_half_precision_keeps_the_filters_numbers_whole(kind: str) -> None:
    model = filtered("llama", **FILTERS[kind]).float()
    wanted = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gradients(model)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name
    big = [name for name, value in wanted.items() if value.norm() > 0.1 * max(g.norm() for g in wanted.values())]
    for name in big:
        assert (mixed[name] - wanted[name]).norm() < 0.2 * wanted[name].norm(), name
    half = model.to(torch.bfloat16)
    assert {value.dtype for value in scalars(half).values()} <= {torch.float32}
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients(half).values())


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": text()[index], "labels": text()[index]}


def test_the_trainer_moves_the_filters_numbers_and_decays_none(tmp_path: Path) -> None:
    model = filtered("llama", **FILTERS["positions"], boosting="learned").float()
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, learning_rate=1e-2, weight_decay=0.1, report_to=[], bf16=True,
        disable_tqdm=True, save_strategy="steps", save_steps=1, logging_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Texts())
    decayed = set(trainer.get_decay_parameter_names(model))
    assert decayed
    assert not decayed & set(scalars(model))
    before = {name: value.detach().clone() for name, value in scalars(model).items()}
    trainer.train()
    assert before
    assert all(not torch.equal(value, before[name]) for name, value in scalars(model).items())
    wanted = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(filtered("llama", **FILTERS["positions"], boosting="learned").float(), arguments, None, Texts())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], msg=name)
