"""Losses of the classification heads that a trainer may sum over several batches.

Trainer hands ``num_items_in_batch``, the number of labels in all the batches before a step, to every model whose
``forward`` takes it, and then leaves the sum of the losses as it is. A head that ignores it has its gradients
multiplied by the number of batches; stock heads for texts do, and those for images with two of their three losses.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForSequenceClassificationLoss, fixed_cross_entropy
from transformers.utils.generic import can_return_tuple

from .modeling_pairs import texts_of_pairs


def classification_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config: Any,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The stock loss of one label, several labels or numbers for each row, chosen by ``config.problem_type``.

    Args:
        labels: ``[batch]``, or ``[batch, num_labels]`` for several labels or numbers.
        logits: ``[batch, num_labels]``.
        config: ``num_labels`` and ``problem_type``, which is set by the first labels if it is None, as in the library.
        num_items_in_batch: by which the sum of the loss is divided; None: its mean.
        **kwargs: not used.
    """
    loss: torch.Tensor = ForSequenceClassificationLoss(labels, logits, config, num_items_in_batch=num_items_in_batch)
    if num_items_in_batch is not None and config.problem_type != "single_label_classification":
        loss = loss * (labels.numel() / _same_device(num_items_in_batch, loss))
    return loss


def token_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config: Any,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Cross-entropy of a label, or a word, for each token; labels of -100 do not count.

    Args:
        labels: ``[batch, length]``.
        logits: ``[batch, length, num_labels or vocabulary]``.
        config: not used.
        num_items_in_batch: by which the sum of the loss is divided; None: its mean.
        **kwargs: not used.
    """
    labels = labels.to(logits.device).view(-1)
    return fixed_cross_entropy(logits.view(-1, logits.shape[-1]), labels, num_items_in_batch=num_items_in_batch)


def _same_device(count: torch.Tensor | int, loss: torch.Tensor) -> torch.Tensor | int:
    return count.to(loss.device) if torch.is_tensor(count) else count


class SummedLossMixin:
    """Put before a stock text classifier: its own ``loss_function``, which knows ``num_items_in_batch``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock ``forward``; see there for the other arguments and what is returned.

        ``num_items_in_batch`` is the number of labels by which the sum of the loss is divided, in place of its mean.
        """
        output = super().forward(  # type: ignore[misc]
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        return _with_loss(self, output, labels, num_items_in_batch)


_ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class SummedEncoderLossMixin:
    """As :class:`SummedLossMixin`, before a stock head of an encoder, which has no cache."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock ``forward``; see there for the other arguments and what is returned.

        ``num_items_in_batch`` is the number of labels by which the sum of the loss is divided, in place of its mean.
        """
        inputs: tuple[Any, ...] = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if getattr(self, "takes_pairs", False):
            inputs = texts_of_pairs(dict(zip(_ENCODER_INPUTS, inputs, strict=True)))
        output = super().forward(*inputs, **{**kwargs, "return_dict": True})  # type: ignore[misc]
        return _with_loss(self, output, labels, num_items_in_batch)


def _with_loss(model: Any, output: Any, labels: torch.Tensor | None, count: torch.Tensor | int | None) -> Any:
    """A model's output with the loss of its labels, if there are any."""
    if labels is None:
        return output
    loss = model.loss_function(labels, output.logits, model.config, num_items_in_batch=count)
    return type(output)(**{**output, "loss": loss})
