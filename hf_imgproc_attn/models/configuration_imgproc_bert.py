"""Configuration of BERT with a chosen attention filter."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from .configuration_peft import tell_peft
from .spec_axes import HEADS
from .spec_fields import FilterSpecMixin, with_plain_numbers

_DECODER = "this is an encoder, whose tokens see those before and after them"


@with_plain_numbers
@strict
class ImgProcBertConfig(FilterSpecMixin, BertConfig):
    """The stock ``BertConfig`` and the filter fields of ``FilterSpecMixin``; the defaults are the stock model.

    Attributes:
        classifier_pooling: what the pooler of a bare model or of a classifier of texts reads: ``"cls"``, the first
            token, or ``"mean"``, the mean over all tokens that are no padding.
        classifier_pairs: whether a classifier of texts classifies pairs of them, ``[pairs, 2, length]``: both are
            encoded by themselves, and an MLP compares the two pooled vectors (no pooler stands between).

    Example:
        >>> from hf_imgproc_attn import ImgProcBertConfig
        >>> ImgProcBertConfig.from_preset("twicing").boosting
        'twicing'
    """

    model_type = "imgproc_bert"
    base_model_tp_plan = {
        "encoder.layer.*.attention.self": HEADS,
        **{f"encoder.layer.*.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    }
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_pairs: bool = False
    needs_positions = True
    must_be = {
        "is_decoder": (False, _DECODER),
        "add_cross_attention": (False, _DECODER),
        "position_embedding_type": ("absolute", "relative positions are the position_kernel 'relative_buckets' here"),
    }

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time; PEFT, which calls it, learns its targets here."""
        # With the module that holds them: the filters have projections called query and value too.
        names = {**{name: [f"self.{name}"] for name in ("query", "key", "value")}, "output.dense": ["output.dense"]}
        tell_peft(self.model_type, like="bert", names=names)
        return super().to_dict()


ImgProcBertConfig.register_for_auto_class()
