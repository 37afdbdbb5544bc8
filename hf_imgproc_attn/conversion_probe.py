"""How far a conversion moves the outputs: a probe of the numbers, and what a user feels.

That is the cross-entropy of a language model on texts of its own (drawn from the source, so that no data is needed and
the source is as good on them as on any), and the share of predictions that change for a classifier.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .conversion_source import heads_by_class
from .models.layer_grid import sides

_PROBE_LENGTH = 32
SAMPLED_TEXTS, SAMPLED_LENGTH = 8, 64
"""Texts drawn from a language model, and their length in tokens at most."""
RANDOM_INPUTS = 16
"""Images or texts for a classifier, where the caller gives none."""

_MEASURED = {
    "AutoModelForCausalLM": "cross_entropy",
    "AutoModelForMaskedLM": "predictions",
    "AutoModelForSequenceClassification": "predictions",
    "AutoModelForTokenClassification": "predictions",
    "AutoModelForImageClassification": "predictions",
}


class Change(NamedTuple):
    """What a user feels of a conversion; None where the model has no such outputs.

    described: on what it was measured.
    before: cross-entropy of the source in nats a token.
    after: that of the variant.
    changed: predictions that are others.
    predictions: how many there are.
    """

    described: str
    before: float | None = None
    after: float | None = None
    changed: int | None = None
    predictions: int | None = None

    @property
    def rise(self) -> float | None:
        """Of the cross-entropy, in nats a token."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def is_large(self) -> bool:
        """More than 0.05 nats a token, or more than one prediction in twenty: more than noise in training costs."""
        if self.changed is not None and self.predictions:
            return self.changed > self.predictions / 20
        return self.rise is not None and not self.rise <= 0.05

    def __str__(self) -> str:
        if self.rise is not None:
            return (
                f"cross-entropy on {self.described} rises by {self.rise:.3f} nats a token, from {self.before:.3f} to "
                f"{self.after:.3f}"
            )
        return f"{self.changed} of {self.predictions} predictions change on {self.described}"


class Inputs(NamedTuple):
    """What the models are compared on: token ids ``[texts, length]`` or images ``[n, channels, height, width]``."""

    tensor: torch.Tensor
    described: str


def probe_inputs(source: PreTrainedModel, checkpoint: str, given: torch.Tensor | None) -> Inputs | None:
    """The caller's inputs, or random ones with a fixed seed; None for a model whose outputs are no predictions.

    Args:
        source: the model that is converted.
        checkpoint: its name or path, for the statistics of its image processor.
        given: token ids or images of the caller, or None.

    Raises:
        ValueError: for inputs that are none of this model.
    """
    if given is not None:
        _check_given(source, given)
        return Inputs(given, f"the {len(given)} samples that were given")
    if not _predicts(source):
        return None
    config, generator = _input_config(source), torch.Generator().manual_seed(0)
    if source.main_input_name != "input_ids":
        statistics = _pixel_statistics(checkpoint, config.num_channels)
        mean, std, told_by = statistics
        low = torch.rand(RANDOM_INPUTS, config.num_channels, 4, 4, generator=generator)
        images = nn.functional.interpolate(low, size=sides(config.image_size), mode="bilinear")
        images = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        return Inputs(images, f"random images (no data was given) with the pixel statistics of {told_by}")
    if _is_language_model(source):
        texts = sample_texts(source, generator)
        return Inputs(texts, f"{texts[:, 1:].numel()} tokens that the source itself wrote")
    length = min(_PROBE_LENGTH, longest_text(config))
    ids = torch.randint(config.vocab_size, (RANDOM_INPUTS, *_of_each(source), length), generator=generator)
    return Inputs(ids, "random tokens (no data was given)")


@torch.no_grad()
def measure(source: PreTrainedModel, variant: PreTrainedModel, inputs: Inputs) -> Change:
    """Compare two models that are in evaluation mode."""
    if _is_language_model(source):
        before, after = (_cross_entropy(model, inputs.tensor) for model in (source, variant))
        return Change(inputs.described, before=before, after=after)
    predictions = [_predictions(model, inputs.tensor) for model in (source, variant)]
    changed = int((predictions[0] != predictions[1]).sum())
    return Change(inputs.described, changed=changed, predictions=predictions[0].numel())


@torch.no_grad()
def difference(source: PreTrainedModel, variant: PreTrainedModel) -> tuple[float, float]:
    """Largest difference of the two models' outputs on a fixed random input, and the source outputs' deviation."""
    config, generator = _input_config(source), torch.Generator().manual_seed(0)
    if source.main_input_name == "input_ids":
        length = min(_PROBE_LENGTH, longest_text(config))
        inputs = torch.randint(config.vocab_size, (1, *_of_each(source), length), generator=generator)
    else:
        inputs = torch.randn(1, config.num_channels, *sides(config.image_size), generator=generator)
    outputs = [_run(model, inputs)[0] for model in (source, variant)]
    outputs = [(output[-1] if isinstance(output, tuple) else output).float().cpu() for output in outputs]
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].std(correction=0))


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel, generator: torch.Generator, length: int = SAMPLED_LENGTH, count: int = SAMPLED_TEXTS
) -> torch.Tensor:
    """Texts drawn from a language model token by token, ``[texts, length]``, beginning with its start token."""
    config = _input_config(model)
    start = next((token for token in (config.bos_token_id, config.eos_token_id) if token is not None), 0)
    texts = torch.full((count, 1), start % config.vocab_size, device=model.device)
    cache = None
    while texts.shape[1] < min(length, longest_text(config)):
        output = model(texts[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        texts = torch.cat((texts, drawn.to(texts.device)), dim=1)
    return texts


@torch.no_grad()
def can_be_probed(model: PreTrainedModel) -> bool:
    """Whether :func:`difference` knows what a model is called with: texts or images, and nothing beside."""
    config = _input_config(model)
    text = model.main_input_name == "input_ids" and hasattr(config, "vocab_size")
    image = model.main_input_name == "pixel_values" and hasattr(config, "image_size")
    return (text or image) and not (hasattr(model.config, "text_config") and hasattr(model.config, "vision_config"))


def longest_text(config: Any) -> int:
    """Tokens that a model has positions for; 2048 where it has no limit of its own."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return 2048
    # RoBERTa and its like count their positions from behind the padding token.
    behind = config.pad_token_id if getattr(config, "type_vocab_size", None) == 1 and config.pad_token_id else -1
    return limit - behind - 1


def _input_config(model: PreTrainedModel) -> Any:
    """The configuration that tells what a model's inputs are: of one that also has other parts, the texts' one."""
    config: Any = model.config
    return config.get_text_config() if model.main_input_name == "input_ids" else config


def _of_each(model: PreTrainedModel) -> tuple[int, ...]:
    """``(2,)`` for a classifier whose samples are pairs of texts, else nothing."""
    return (2,) if getattr(model, "takes_pairs", False) else ()


def _run(model: PreTrainedModel, inputs: torch.Tensor) -> Any:
    is_text, config = model.main_input_name == "input_ids", model.config
    options: dict[str, Any] = {"use_cache": False} if is_text and hasattr(config, "use_cache") else {}
    dtype = model.dtype if inputs.is_floating_point() else inputs.dtype
    given = inputs.to(model.device, dtype)
    if is_text and config.is_encoder_decoder:
        options["decoder_input_ids"] = given
    return model(**{model.main_input_name: given}, **options)


def _cross_entropy(model: PreTrainedModel, texts: torch.Tensor) -> float:
    total = 0.0
    for text in texts.split(1):  # one at a time: logits of a large vocabulary fill the memory
        logits = _run(model, text).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, text[0, 1:].to(logits.device), reduction="sum"))
    return total / texts[:, 1:].numel()


def _predictions(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    # One at a time: a text classifier without a padding token takes no batch.
    logits = [_run(model, one).logits.float() for one in inputs.split(1)]
    classes = 1 if logits[0].ndim == 4 else -1  # of an image's places the classes come first
    return torch.cat([each.argmax(classes).cpu().flatten() for each in logits])


def _is_language_model(model: PreTrainedModel) -> bool:
    return _measured(model) == "cross_entropy"


def _predicts(model: PreTrainedModel) -> bool:
    classifies = "Classification" in type(model).__name__
    return _measured(model) is not None and not (classifies and model.config.num_labels < 2)


def _measured(model: PreTrainedModel) -> str | None:
    """What a conversion changes for the user of a model: see ``backbones.Head``; of other types by its Auto class."""
    heads = heads_by_class()
    for kind in type(model).__mro__:
        if kind.__name__ in heads:
            return heads[kind.__name__].measured
    for auto_class, measured in _MEASURED.items():
        known = getattr(transformers, auto_class)._model_mapping.get(type(model.config), None)
        if set(type(model).__mro__) & set(known if isinstance(known, (tuple, list)) else (known,)):
            return measured
    return None


def _check_given(model: PreTrainedModel, given: torch.Tensor) -> None:
    config, longest = _input_config(model), longest_text(model.config)
    if not _predicts(model):
        raise ValueError(f"samples must be None for a model without predictions, got them for {type(model).__name__}")
    if model.main_input_name == "input_ids":
        texts = "[pairs, 2, length]" if (each := _of_each(model)) else "[texts, length]"
        fits = given.ndim >= 2 and not given.is_floating_point() and 2 <= given.shape[-1] <= longest
        fits = fits and tuple(given.shape[1:-1]) == each
        wanted = f"token ids {texts} with a length from 2 to {longest}"
    else:
        shape = (config.num_channels, *sides(config.image_size))
        fits, wanted = (
            given.ndim == 4 and given.is_floating_point() and tuple(given.shape[1:]) == shape,
            (f"pixel values [images, {', '.join(map(str, shape))}], as the image processor gives them"),
        )
    if not fits or not len(given):
        raise ValueError(f"samples must be {wanted}, got {given.dtype} of shape {tuple(given.shape)}")


def _pixel_statistics(checkpoint: str, num_channels: int) -> tuple[list[float], list[float], str]:
    """Mean and deviation with which the checkpoint's image processor normalises, or ViT's usual ones, and whose."""
    try:
        path = cached_file(checkpoint, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # a model in memory has the name of no checkpoint
        path = None
    if path is not None:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        found = [fields.get(name) for name in ("image_mean", "image_std")]
        if all(isinstance(values, list) and len(values) == num_channels for values in found):
            return found[0], found[1], "its image processor"
    return [0.5] * num_channels, [0.5] * num_channels, "ViT's usual image processor"
