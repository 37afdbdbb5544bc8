"""Part a: whole models on the device against the same weights in float64 on the CPU.

Every preset on both backbones: logits and gradients in float32 (no TF32), bfloat16, float16 and under autocast, and
generation with a cache, each as a multiple of what the stock model's own error is in the same precision. Then what a
user does next: train, checkpoint activations, compile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from ...backbones import BACKBONES as ROWS
from ...backbones import GPT2, VIT
from ...models.spec_fields import PRESETS
from .parts import Bench, Case, Wrong
from .random_models import FULL, MODES, TINY, Result, Sizes, build, exact, inputs_for, run_model
from .tensors import relative_error

BACKBONES = tuple(row.name for row in ROWS.values() if row.in_gpu_check)
LARGEST_MULTIPLE = 16.0
"""Of the stock model's error; above it, and above the floor, a result is wrong."""
FLOORS = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 6e-3, "autocast bfloat16": 4e-2}
"""Relative errors that the precision explains: some times those of a CPU (8e-7, 1.4e-2, 1.7e-3, 1e-2). TF32 is not."""

_FIRST = ("softmax", "twicing", "bilateral", "bilateral_twicing", "bilateral_gaussian")
_COMPILED = ((GPT2.name, "twicing"), (VIT.name, "bilateral"))
_TRAINED = ((GPT2.name, "twicing"), (VIT.name, "bilateral_twicing"))


def cases(bench: Bench) -> list[Case]:
    """The cases, presets of the two papers first."""
    names = [*_FIRST, *(name for name in PRESETS if name not in _FIRST)]
    limit = 75.0
    found = [
        Case(f"{backbone} {name}", partial(compare, bench, backbone, name), limit, about("all modes", backbone, name))
        for name in names
        for backbone in BACKBONES
        if name not in ROWS[backbone].refused_presets
    ]
    found += [
        Case(f"generation {name}", partial(generate, bench, name), limit, about("generation", GPT2.name, name))
        for name in names
        if name not in GPT2.refused_presets
    ]
    for what, check, chosen, seconds in (
        ("training", train, _TRAINED, limit),
        ("gradient checkpointing", checkpoint_activations, _COMPILED, limit),
        ("torch.compile", compile_model, _COMPILED, 150.0),
    ):
        found += [
            Case(
                f"{what} {backbone} {name}",
                partial(check, bench, backbone, name),
                seconds,
                about(what, backbone, name),
            )
            for backbone, name in chosen
        ]
    # Compiling takes longest, so it starts as early as what is worth more allows: others run beside it.
    compiled = [case for case in found if case.about["what"] == "torch.compile"]
    rest = [case for case in found if case not in compiled]
    return rest[:10] + compiled + rest[10:]


def about(what: str, backbone: str, preset: str) -> dict[str, str]:
    """What a case is about."""
    return {"what": what, "backbone": backbone, "preset": preset}


def errors_in(backbone: str, preset: str, bench: Bench) -> dict[str, dict[str, float | str]]:
    """Relative errors of logits and gradients in every mode, and the parameter whose gradient is worst."""
    sizes = TINY if bench.tiny else FULL
    truth = exact(backbone, preset, sizes)
    found: dict[str, dict[str, float | str]] = {}
    for mode, (dtype, autocast) in MODES.items():
        model = build(backbone, preset, sizes).to(bench.device, dtype)
        got = run_model(model, inputs_for(backbone, sizes), dtype, autocast)
        if got.gradients.keys() != truth.gradients.keys():
            missing = sorted(truth.gradients.keys() ^ got.gradients.keys())
            raise Wrong(f"{mode}: gradients of other parameters than in float64: {missing}", {})
        names = sorted(truth.gradients)
        every = [torch.cat([side[name].flatten() for name in names]) for side in (got.gradients, truth.gradients)]
        # A parameter whose gradient is next to nothing beside the others' has only rounding to show.
        whole = every[1].norm() * 1e-2
        single = {name: relative_error(got.gradients[name], truth.gradients[name], float(whole)) for name in names}
        worst = max(single, key=lambda name: single[name])
        found[mode] = {
            "logits": relative_error(got.logits, truth.logits),
            "gradients": relative_error(every[0], every[1]),
            "worst_gradient": single[worst],
            "worst_parameter": worst,
        }
    return found


@cache
def stock_errors(backbone: str, bench_device: str) -> dict[str, dict[str, float | str]]:
    """The yardstick: the same of the stock model, once a process."""
    return errors_in(backbone, "softmax", Bench(bench_device))


def compare(bench: Bench, backbone: str, preset: str, seconds_left: float) -> dict[str, Any]:
    """A preset in every mode against float64, and as multiples of the stock model's errors."""
    stock = stock_errors(backbone, bench.device)
    values: dict[str, Any] = stock if preset == "softmax" else errors_in(backbone, preset, bench)
    values = {mode: dict(found) for mode, found in values.items()}
    wrong = []
    for mode, found in values.items():
        for part in ("logits", "gradients"):
            yardstick = float(stock[mode][part])
            found[f"{part}_multiple"] = found[part] / yardstick
            # The yardstick itself has no multiple: were TF32 on by mistake, it alone would show it.
            allowed = FLOORS[mode] if preset == "softmax" else max(LARGEST_MULTIPLE * yardstick, FLOORS[mode])
            if not found[part] <= allowed:
                wrong.append(f"{mode}: relative error of {part} {found[part]:.2g}, allowed {allowed:.2g}")
    if wrong:
        raise Wrong("; ".join(wrong), values)
    return values


def greedy(model: Any, prompt: torch.Tensor, sizes: Sizes, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy generation: the logits of every step in float64, and the tokens that they were computed from; on the CPU.

    Args:
        model: a causal language model, anywhere.
        prompt: ``[batch, length]`` on the CPU.
        sizes: how many tokens are new.
        **options: of ``generate``.
    """
    out = model.generate(
        prompt.to(model.device),
        do_sample=False,
        min_new_tokens=sizes.new_tokens,
        max_new_tokens=sizes.new_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits, dim=1).double().cpu(), out.sequences.cpu()[:, :-1]


def generate(bench: Bench, preset: str, seconds_left: float) -> dict[str, Any]:
    """Greedy generation with a cache and left padding; every step's logits against float64 without a cache."""
    sizes = TINY if bench.tiny else FULL
    prompt = inputs_for(GPT2.name, sizes)["input_ids"]
    mask = torch.ones_like(prompt)
    mask[0, : sizes.length // 4] = 0
    values: dict[str, Any] = {}
    wrong = []
    for mode in ("float32", "bfloat16"):
        model = build(GPT2.name, preset, sizes).eval().to(bench.device, MODES[mode][0])
        got, sequences = greedy(model, prompt, sizes, attention_mask=mask.to(bench.device))
        seen = torch.cat((mask, torch.ones(2, sequences.shape[1] - sizes.length, dtype=mask.dtype)), dim=1)
        reference = build(GPT2.name, preset, sizes).eval().double()
        reference.set_attn_implementation("eager")
        with torch.no_grad():
            places = (seen.cumsum(-1) - 1).clamp(min=0)
            truth = reference(sequences, attention_mask=seen, position_ids=places, use_cache=False).logits
        truth = truth[:, sizes.length - 1 :]
        error = relative_error(got, truth)
        values[mode] = {"logits": error, "same_choices": float((got.argmax(-1) == truth.argmax(-1)).double().mean())}
        if not error <= FLOORS[mode]:
            wrong.append(f"{mode}: relative error of the logits {error:.2g}, allowed {FLOORS[mode]:.2g}")
    if wrong:
        raise Wrong("; ".join(wrong), values)
    return values


def checkpoint_activations(bench: Bench, backbone: str, preset: str, seconds_left: float) -> dict[str, Any]:
    """Gradients with activation checkpointing, of both kinds, against those without."""
    sizes = TINY if bench.tiny else FULL
    model = build(backbone, preset, sizes).to(bench.device).train()
    wanted = run_model(model, inputs_for(backbone, sizes), torch.float32)
    values = {}
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        got = run_model(model, inputs_for(backbone, sizes), torch.float32)
        model.gradient_checkpointing_disable()
        names = sorted(wanted.gradients)
        joined = [torch.cat([side.gradients[name].flatten() for name in names]) for side in (got, wanted)]
        values["re-entrant" if reentrant else "not re-entrant"] = relative_error(joined[0], joined[1])
    if not max(values.values()) <= 1e-4:
        raise Wrong(f"gradients differ from those without checkpointing: {values}, allowed 1e-4", values)
    return values


def compile_model(bench: Bench, backbone: str, preset: str, seconds_left: float) -> dict[str, Any]:
    """``torch.compile`` in one graph: forward and backward, in float32 and under autocast, against float64."""
    sizes = TINY._replace(layers=1) if bench.tiny else FULL
    truth = exact(backbone, preset, sizes)
    names = sorted(truth.gradients)

    def joined(result: Result) -> torch.Tensor:
        return torch.cat([result.gradients[name].flatten() for name in names])

    values: dict[str, Any] = {}
    wrong = []
    for mode in ("float32",) if bench.tiny else ("float32", "autocast bfloat16"):
        dtype, autocast = MODES[mode]
        model = build(backbone, preset, sizes).to(bench.device, dtype)
        backend = "aot_eager" if bench.tiny else "inductor"
        compiled = _Compiled(model, torch.compile(model, backend=backend, fullgraph=True))
        got = run_model(compiled, inputs_for(backbone, sizes), dtype, autocast)
        values[mode] = {
            "logits": relative_error(got.logits, truth.logits),
            "gradients": relative_error(joined(got), joined(truth)),
        }
        if not max(values[mode].values()) <= FLOORS[mode]:
            wrong.append(f"{mode}: relative errors {values[mode]}, allowed {FLOORS[mode]:.2g}")
        torch.compiler.reset()
    if wrong:
        raise Wrong("; ".join(wrong), values)
    return values


class _Compiled:
    """A compiled model whose parameters have the names of the model itself."""

    def __init__(self, model: Any, compiled: Callable[..., Any]) -> None:
        self._model, self._compiled = model, compiled
        self.parameters, self.named_parameters = model.parameters, model.named_parameters
        self.zero_grad = model.zero_grad

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self._compiled(**inputs)


class _Repeating(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few inputs with labels, over and over: a model that trains learns them by heart."""

    def __init__(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        self._inputs, self._labels = inputs, labels

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = index % len(self._labels)
        return {name: tensor[row] for name, tensor in self._inputs.items()} | {"labels": self._labels[row]}


def train(bench: Bench, backbone: str, preset: str, seconds_left: float) -> dict[str, Any]:
    """Thirty steps of ``Trainer``: the loss falls, and the checkpoint that it writes gives the same logits."""
    from transformers import Trainer, TrainingArguments

    sizes = TINY if bench.tiny else FULL
    torch.manual_seed(0)
    model = build(backbone, preset, sizes)
    inputs = inputs_for(backbone, sizes)
    labels = inputs["input_ids"] if ROWS[backbone].input == "text" else torch.tensor([1, 7])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=30,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            bf16=True,
            use_cpu=bench.tiny,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=_Repeating(inputs, labels))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        loaded = type(model).from_pretrained(f"{folder}/checkpoint-30").to(bench.device).eval()
    # Not the trained object itself, whose `forward` accelerate has wrapped in autocast.
    kept = build(backbone, preset, sizes).to(bench.device).eval()
    kept.load_state_dict(model.state_dict())
    moved = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        difference = relative_error(loaded(**moved).logits, kept(**moved).logits)
    values = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1], "reloaded_error": difference}
    if not (len(losses) == 30 and losses[-1] < 0.9 * losses[0] and difference <= 1e-5):
        raise Wrong(f"the loss should fall in 30 steps and the checkpoint give the same logits: {values}", values)
    return values
