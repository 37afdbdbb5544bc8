"""What our pre-trained models share on both backbones: loading, saving, initialisation and input checks."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .boost_gradient import ZeroLinear
from .layer_parameters import FilterScalars, PositionProjection
from .layer_summary import FilterSummary, filter_summary
from .modeling_adapters import load_with_copies
from .modeling_names import tell_class_name
from .spec_axes import is_stock_layer

logger = logging.get_logger(__name__)

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")


def check_attn_implementation(name: str | None, also: tuple[str, ...] = ()) -> None:
    """Refuse attention back-ends that are not built, in the words of the library.

    Args:
        name: the value that is asked for.
        also: what is allowed beside ``SUPPORTED_IMPLEMENTATIONS``.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    allowed = (*SUPPORTED_IMPLEMENTATIONS, *also)
    if name is not None and name not in allowed:
        listed = ", ".join(f'`attn_implementation="{each}"`' for each in allowed)
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported. The only possible arguments are {listed}.'
        )


def check_activation(config: Any) -> None:
    """Refuse the name of an activation function that there is not.

    Raises:
        ValueError: naming the field and what is allowed.
    """
    for field in ("hidden_act", "activation_function"):
        name = getattr(config, field, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise ValueError(f"{field} must be one of {', '.join(sorted(ACT2FN))}, got {name!r}")


# Parameters that exist or not, or change their meaning, with the variant.
_VARIANT_PARAMETER = re.compile(r"\.filter\.|(^|\.)(position_projection\.|wpe\.|position_embeddings(\.weight)?$)")


class FilterPreTrainedMixin:
    """Put before the backbone's stock ``PreTrainedModel`` class.

    ``auto_map`` lists every Auto class of the backbone: Transformers itself writes only the saved class, and the
    folder of a classifier would then not load as a base model.
    """

    auto_map: dict[str, str] = {}
    load_listeners: ClassVar[list[Callable[[Any, Any, dict[str, Any]], None]]] = []
    """Called after every load with what was loaded, the model and the options; empty in code that came with a
    checkpoint, where nobody fills it."""

    has_paged_attention: ClassVar[bool] = False
    """Whether the stock attention of this backbone understands the paged caches of continuous batching."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tell_class_name(cls, cls.auto_map, getattr(cls.config_class, "model_type", ""))  # type: ignore[attr-defined]

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        config = self.config  # type: ignore[attr-defined]
        # What continuous batching sets in place of `eager`, and in Transformers 5.17 of `sdpa` too, and only the stock
        # layers of a decoder understand.
        is_stock = self.has_paged_attention and all(is_stock_layer(config, s) for s in config.layer_specs)
        paged = [name for name in ("paged|eager", "paged|sdpa") if is_stock and name in ALL_ATTENTION_FUNCTIONS]
        check_attn_implementation(attn_implementation, tuple(paged))
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]

    def post_init(self) -> None:
        """The stock ``post_init``, without names of modules that hold nothing in this variant."""
        if not any(".scalar_bias." in name for name, _ in self.named_parameters()):  # type: ignore[attr-defined]
            self._keep_in_fp32_modules_strict: Any = None
        super().post_init()  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, FilterScalars | ZeroLinear):
            module.reset_parameters()

    def filter_summary(self) -> FilterSummary:
        """Bandwidths, gains, class-token and bucket logits of every layer and head, as rows that print as a table."""
        return filter_summary(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The stock ``save_pretrained``, with all Auto classes of the backbone in the configuration's ``auto_map``.

        A class that was derived elsewhere, e.g. in a notebook, has no file that could travel. Its checkpoint is saved
        as one of the class here that it derives from, which loads anywhere, and that is said. A class in a module of
        its own travels, with that module, once it is registered (``MyModel.register_for_auto_class(...)``).
        """
        config, own = self.config, type(self)  # type: ignore[attr-defined]
        home = next((kind for kind in own.__mro__ if _is_of_this_folder(kind) and vars(kind).get("_auto_class")), None)
        is_registered = "_auto_class" in vars(own) and own.__module__ != "__main__"
        if home is own or not (home is None or is_registered):
            config.auto_map = dict(self.auto_map)
        else:
            # Transformers adds what the user registered; files of the other classes would not be there.
            config.auto_map = {key: name for key, name in self.auto_map.items() if key == "AutoConfig"}
        if not is_registered:
            _say_what_stays_behind(own, home)
        with contextlib.nullcontext() if is_registered or home in (None, own) else _under_the_name_of(home, self):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """The stock ``from_pretrained``, which refuses a checkpoint of another variant.

        Transformers would initialise what is missing, drop what is unexpected and only log it: another model than was
        saved. ``ignore_mismatched_sizes=True`` asks for exactly that and switches the check off. Weights are read from
        safetensors files only, unless ``use_safetensors=False`` asks for pickles, which can run code.

        Raises:
            ValueError: if parameters of the filter are missing in the checkpoint or unexpected, naming them.
            RuntimeError: if other parameters have other shapes, naming them.
            OSError: if a weights file is truncated or corrupt.
        """
        forced = kwargs.pop("ignore_mismatched_sizes", False)
        options = {"use_safetensors": True, **kwargs}
        try:
            # Transformers' own error for other shapes names no tensor; ours names them all.
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:
            # By name: safetensors is not among the packages that code travelling with a checkpoint may import.
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"the weights of {str(pretrained_model_name_or_path)!r} cannot be read, the safetensors file is "
                f"truncated or corrupt: {error}"
            ) from error
        if not forced:
            refuse_other_variant(pretrained_model_name_or_path, info)
        for listener in cls.load_listeners:
            listener(pretrained_model_name_or_path, model, kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        return load_with_copies(super()._load_pretrained_model, *args, **kwargs)  # type: ignore[misc]


@contextlib.contextmanager
def _under_the_name_of(home: type, model: Any) -> Iterator[None]:
    """Give a model the name and module of a class that travels, so that Transformers copies that one's files."""
    own, config = type(model), model.config
    model.__class__ = type(
        home.__name__, (own,), {"__module__": home.__module__, "_auto_class": vars(home)["_auto_class"]}
    )
    if not _is_of_this_folder(type(config)):
        config._auto_class = None  # its file would not load elsewhere; the one here comes with the model's
    try:
        yield
    finally:
        model.__class__ = own
        vars(config).pop("_auto_class", None)


def _say_what_stays_behind(own: type, home: type | None) -> None:
    """Warn that a class cannot travel with its checkpoint, and say what an Auto class is going to load."""
    if own is home or own.__module__.startswith("torch."):  # FSDP derives classes too
        return
    instead = (
        "no Auto class loads it" if home is None else f"an Auto class loads {home.__name__}, without what it changes"
    )
    logger.warning_once(
        f"{own.__name__} is defined in {own.__module__}, which does not travel with the checkpoint: {instead}. "
        f"{own.__name__}.from_pretrained loads it as it is"
    )


def _is_of_this_folder(kind: type) -> bool:
    """Whether a class is defined in this package's folder of models, or in the one that came with a checkpoint."""
    return kind.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def refuse_other_variant(source: Any, loading_info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose filter parameters are not those of the model it was loaded into.

    Args:
        source: name of the checkpoint, for the message.
        loading_info: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` as ``from_pretrained`` reports them.

    Raises:
        ValueError: for another variant, naming the missing and the unexpected parameters and those of another shape.
        RuntimeError: as in the library, for other shapes alone, naming them.
    """
    found = {
        kind: sorted(key for key in loading_info[f"{kind}_keys"] if _VARIANT_PARAMETER.search(key))
        for kind in ("missing", "unexpected")
    }
    reshaped = {
        key: f"{list(saved)} in place of {list(wanted)}" for key, saved, wanted in loading_info["mismatched_keys"]
    }
    message = f"parameters of another shape {reshaped}" if reshaped else ""
    if any(found.values()) or any(_VARIANT_PARAMETER.search(key) for key in reshaped):
        raise ValueError(
            f"the checkpoint {str(source)!r} is of another variant than the configuration it is loaded into: "
            f"missing parameters {found['missing']}, unexpected parameters {found['unexpected']}"
            f"{', ' * bool(message)}{message}. Load it with its own configuration; hf_imgproc_attn.convert turns a "
            "stock checkpoint into a variant"
        )
    if reshaped:
        raise RuntimeError(
            f"the checkpoint {str(source)!r} has {message}: load it with its own configuration, or pass "
            "ignore_mismatched_sizes=True to have them initialised anew"
        )


def shared_position_projection(
    config: Any, num_heads: int, head_dim: int, layer_norm_eps: float
) -> PositionProjection | None:
    """The position projections that all layers share, or None where each has its own or none."""
    if not config.share_position_projections:
        return None
    return PositionProjection(config.hidden_size, num_heads, head_dim, layer_norm_eps)


class RunTimeChoices(NamedTuple):
    """How the layers of one forward pass compute; fields of ``LayerInputs``.

    backend: of the filters.
    attentions: which attentions the filters return, or None.
    """

    backend: str
    attentions: str | None


def run_time_choices(config: Any, output_attentions: bool) -> RunTimeChoices:
    """What the configuration asks for now: ``eager`` is the dense reference, ``sdpa`` leaves it to ``filter_backend``.

    Raises:
        ValueError: for an attention implementation that is not supported.
    """
    implementation = config._attn_implementation
    check_attn_implementation(implementation)
    if implementation == "eager":
        return RunTimeChoices("reference", config.attention_output if output_attentions else None)
    if output_attentions:
        logger.warning_once(
            f"attn_implementation={implementation!r} does not return attentions: set it to 'eager' for that"
        )
    return RunTimeChoices(config.filter_backend, None)


def wanted_attentions(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether attentions are to be returned; takes what ``capture_outputs`` handles out of a model's arguments."""
    wanted = kwargs.pop("output_attentions", None)
    kwargs.pop("output_hidden_states", None)
    return bool(config.output_attentions if wanted is None else wanted)
