"""How large and how costly the models of a task are, and baselines that are as large or as costly as a variant."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, plain_message
from ..models.spec_fields import FILTER_FIELDS, preset_fields
from .plan import Match, StudyTask, Variant, meaning, training_script

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SAMPLES = 2
_MOST_LAYERS, _MOST_WIDTHS = 32, 64


@dataclass(frozen=True)
class Size:
    """What a model has and costs.

    Attributes:
        parameters: all of them.
        compute: operations of one training step a sample, forward and backward: a multiplication and an addition of
            every matrix product of the dense formulas, as torch's FLOP counter counts them.
    """

    parameters: int
    compute: int


class Prepared:
    """A task with its data and a softmax model, made by its training script, but not trained.

    Args:
        task: of the study.
        baseline: the variant whose sizes the others are varied from.
        seed: any.

    Attributes:
        fingerprints: split -> fingerprint of the data.

    Raises:
        UsageError: for data or options that cannot be used.
    """

    def __init__(self, task: StudyTask, baseline: Variant, seed: int) -> None:
        result = _begun(task, baseline, seed)
        batch = next(iter(result.trainer.get_train_dataloader()))
        self.task = task
        self.fingerprints: dict[str, Any] = result.record["data_fingerprint"]
        self._model_class = type(result.trainer.model)
        self._config = result.trainer.model.config
        self._batch = {name: tensor[:_SAMPLES].cpu() for name, tensor in batch.items()}
        self._baseline = baseline
        self._seed = seed

    def check_training(self, variants: Sequence[Variant]) -> None:
        """Refuse options of variants that their training would refuse, before any run is begun.

        Raises:
            UsageError: naming the task, the variant and what is wrong.
        """
        checked: list[dict[str, Any]] = [{}, self._baseline.options]
        for variant in variants:
            if variant.options not in checked:
                checked.append(variant.options)
                _begun(self.task, variant, self._seed)

    def size(self, variant: Variant) -> Size:
        """Size of a variant of this task.

        Raises:
            UsageError: for fields that this model cannot have.
        """
        model = self._model(variant)
        return Size(
            model.num_parameters(), step_operations(model, self._batch) // len(next(iter(self._batch.values())))
        )

    def check_different(self, variants: Sequence[Variant]) -> None:
        """Refuse variants that are one model under two names: their runs would be the same.

        Raises:
            UsageError: naming both.
        """
        seen: dict[str, str] = {}
        for variant in variants:
            training = self.task.words(Variant("", "softmax", {}, variant.options), 0)
            content = (self._configuration(variant).to_dict(), meaning(training))
            fields = json.dumps(content, sort_keys=True, default=str)
            other = seen.setdefault(fields, variant.name)
            if other != variant.name:
                raise UsageError(
                    f"task {self.task.name}: {other} and {variant.name} have the same configuration: their runs would "
                    "be equal; leave one out"
                )

    def match(self, match: Match, target: Size) -> tuple[Variant, list[tuple[str, Size]]]:
        """The wider or deeper baseline that has at least as much as a variant, and no more than it needs.

        Widths grow by a channel a head at a time, and the feed-forward network with them; layers are added one at a
        time. Of the narrowest and the shallowest model that suffice, the one that exceeds the target less is taken.

        Args:
            match: what is to be matched.
            target: the size of the variant that it is to be like.

        Returns:
            The baseline, and both candidates with their sizes.

        Raises:
            UsageError: if no model within reason suffices.
        """
        wanted = getattr(target, match.measure)
        candidates = []
        for fields in (self._wider, self._deeper):
            for step in range(_MOST_WIDTHS):
                shape = {**self._baseline.fields, **fields(step)}
                variant = replace(self._baseline, name=match.name, fields=shape)
                size = self.size(variant)
                if getattr(size, match.measure) >= wanted:
                    candidates.append((variant, size))
                    break
        if not candidates:
            raise UsageError(
                f"task {self.task.name}: no wider or deeper baseline has the {match.measure} of {match.like}"
            )
        best = min(candidates, key=lambda candidate: getattr(candidate[1], match.measure))
        return best[0], [(_in_words(variant.fields), size) for variant, size in candidates]

    def _wider(self, step: int) -> dict[str, Any]:
        config = self._config
        width = config.hidden_size + step * config.num_attention_heads
        fields = {"hidden_size": width}
        inner = getattr(config, "intermediate_size", None)
        if inner is not None:  # GPT-2 takes four times the width where nothing is given
            fields["intermediate_size"] = round(inner * width / config.hidden_size)
        elif config.n_inner is not None:
            fields["n_inner"] = round(config.n_inner * width / config.hidden_size)
        return fields

    def _deeper(self, step: int) -> dict[str, Any]:
        return {"num_hidden_layers": min(self._config.num_hidden_layers + step, _MOST_LAYERS)}

    def _configuration(self, variant: Variant) -> PreTrainedConfig:
        config_class = type(self._config)
        given = {name: value for name, value in self._config.to_dict().items() if name not in FILTER_FIELDS}
        overrides = self.task.options.get("config_overrides", {})
        filters = {name: value for name, value in overrides.items() if name in FILTER_FIELDS}
        named = {config_class.attribute_map.get(name, name): value for name, value in variant.fields.items()}
        return config_class.from_dict({**given, **preset_fields(variant.preset), **filters, **named})

    def _model(self, variant: Variant) -> PreTrainedModel:
        try:
            model: PreTrainedModel = self._model_class(self._configuration(variant))
            # The dense reference: back-ends that compute products twice to save memory would make filters, or softmax,
            # look costlier than they are, depending on which of them a shape gets.
            model.set_attn_implementation("eager")
        except Exception as error:  # configurations are refused in several ways, by Transformers and by ours
            raise UsageError(f"task {self.task.name}, variant {variant.name}: {plain_message(error)}") from error
        return model


def _begun(task: StudyTask, variant: Variant, seed: int) -> Any:
    """What the training script returns of a run that it has begun, and not trained."""
    script = training_script(task.kind)
    with tempfile.TemporaryDirectory() as folder:
        words = task.words(variant, seed)
        words += ["--prepare_only=true", f"--output_dir={Path(folder) / 'none'}", "--save_strategy=no"]
        try:
            return script.train(script.read_arguments(words))
        except UsageError as error:
            which = f"task {task.name}" + (f", variant {variant.name}" if variant.options else "")
            raise UsageError(f"{which}: {error}") from error


def step_operations(model: PreTrainedModel, batch: dict[str, Any]) -> int:
    """Operations of the matrix products of one training step, forward and backward, on a batch.

    Args:
        model: with a loss.
        batch: its inputs, labels included, on its device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from ..models.backend_flops import register_formulas

    register_formulas()
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _in_words(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
