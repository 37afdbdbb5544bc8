"""What a row of the table of backbones (``backbones.py``) says, and the check that what it names exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models.spec_fields import PRESETS

_MODELS = Path(__file__).resolve().parent / "models"


@dataclass(frozen=True)
class Head:
    """One model class of a backbone, with or without a head.

    Attributes:
        auto_class: the Auto class that loads it.
        variant: our class.
        stock: the class of Transformers that it stands for; None where there is none.
        told_by: regular expressions; a checkpoint that names no architecture is this one if each of them matches one
            of its tensors. The first head of a backbone whose expressions all match is taken.
        measured: what a conversion changes for its user: ``"cross_entropy"`` on texts that the model writes,
            ``"predictions"``, or None.
        has_parts: whether :attr:`Backbone.optional_parts` are options of its constructor.
    """

    auto_class: str
    variant: str
    stock: str | None
    told_by: tuple[str, ...] = ()
    measured: str | None = None
    has_parts: bool = False


@dataclass(frozen=True)
class Attention:
    """Where a stock checkpoint has what the position projections of a layer start from; ``{}`` is the layer.

    Attributes:
        filter: our filter's module, below which the layer's own projections lie.
        norm: the norm whose output the layer's projections read; ``{before}`` is the layer before.
        first_norm: that of layer 0, where it has another name.
        query: weight of the query projection.
        key: weight of the key projection; the same name where both lie in one tensor, ``[in, query | key | value]``.
    """

    filter: str
    norm: str
    query: str
    key: str
    first_norm: str | None = None

    def norm_of(self, layer: int) -> str:
        """The module of the norm that a layer's projections read."""
        return self.first_norm if self.first_norm and layer == 0 else self.norm.format(layer, before=layer - 1)


@dataclass(frozen=True)
class Task:
    """What one training script teaches, and how its cards speak of it.

    Attributes:
        name: in ``run.json``.
        pipeline: the Hub's name of it.
        command: of ``imgproc-attn``.
        script: of the folder ``training/``, without ``.py``.
        help: of the command, after "train or fine-tune".
        auto_class: loads its checkpoints.
        metric: the one that a card shows first.
        disturbances: kinds of disturbed inputs that a card answers for.
        rows: what the rows of its data are.
        recipe: name and configuration of the small runs whose cards the repository shows; None: it shows none.
    """

    name: str
    pipeline: str
    command: str
    script: str
    help: str
    auto_class: str
    metric: str
    disturbances: tuple[str, ...]
    rows: str
    recipe: tuple[str, str] | None


@dataclass(frozen=True)
class Backbone:
    """A stock architecture whose attention can be any of our filters.

    Attributes:
        name: of the stock model type; ours is :attr:`model_type`, and our files end in it.
        title: as people write it.
        card_title: how a model card begins.
        config: our configuration class.
        stock_config: the one that it extends.
        heads: the model classes; of those that the tensors of a checkpoint may be, the most telling first.
        refused: architectures that the same kind of checkpoint may be and that are not supported -> as ``told_by``.
        input: ``"text"`` or ``"images"``.
        processor_files: one of these turns what a user has into what the model takes.
        attention: where conversion finds a layer's projections.
        tasks: what training scripts teach it.
        new_model: sizes of a new model of a training script, unless its options say otherwise.
        no_dropout: fields that switch dropout off, for measurements.
        tokenizer: Transformers' class for texts.
        needs_positions: whether it would be blind to the order of its input without any; its configuration refuses
            that, and says why.
        in_gpu_check: whether the GPU check has the minutes to run its models.
        optional_parts: option of the bare model -> what the names of its tensors contain. A configuration does not
            tell whether a checkpoint has them.
    """

    name: str
    title: str
    card_title: str
    config: str
    stock_config: str
    heads: tuple[Head, ...]
    input: str
    processor_files: tuple[str, ...]
    attention: Attention
    tasks: tuple[Task, ...]
    new_model: dict[str, Any]
    no_dropout: dict[str, Any]
    tokenizer: str | None = None
    needs_positions: bool = False
    in_gpu_check: bool = True
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    optional_parts: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Ours."""
        return f"imgproc_{self.name}"

    @property
    def module_of(self) -> dict[str, str]:
        """Our classes -> their modules, relative to the package."""
        heads = {head.variant: f".models.modeling_{self.model_type}" for head in self.heads}
        return {self.config: f".models.configuration_{self.model_type}", **heads}

    @property
    def refused_presets(self) -> tuple[str, ...]:
        """Presets that make no sense for it, which its configuration refuses."""
        return tuple(name for name, fields in PRESETS.items() if self._makes_no_sense(fields))

    def _makes_no_sense(self, fields: dict[str, Any]) -> bool:
        kernel, normalisation = fields.get("position_kernel"), fields.get("normalisation")
        if self.is_causal:
            return normalisation == "sinkhorn"
        return kernel == "forget" or fields.get("boosting") == "delta" or (self.needs_positions and kernel == "none")

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only itself and those before it."""
        return any(head.auto_class == "AutoModelForCausalLM" for head in self.heads)

    def head(self, auto_class: str) -> Head:
        """The model that an Auto class loads."""
        return next(head for head in self.heads if head.auto_class == auto_class)

    def our_class(self, name: str) -> Any:
        """One of our classes, imported now."""
        return getattr(importlib.import_module(self.module_of[name], __package__), name)

    def stock_class(self, name: str) -> Any:
        """One of the stock classes, imported now."""
        import transformers

        return getattr(transformers, name)


def check_row(row: Backbone) -> None:
    """Check that every class that a row names is defined where it should be, without importing it.

    Raises:
        ValueError: naming the row, the class and the file.
    """
    own = {
        _MODELS / f"configuration_{row.model_type}.py": [row.config],
        _MODELS / f"modeling_{row.model_type}.py": [head.variant for head in row.heads],
    }
    found = importlib.util.find_spec("transformers")
    stock: dict[Path, list[str]] = {}
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "models" / row.name
        stock = {
            folder / f"configuration_{row.name}.py": [row.stock_config],
            folder / f"modeling_{row.name}.py": [*(head.stock for head in row.heads if head.stock), *row.refused],
        }
        if row.tokenizer is not None:
            stock[folder / f"tokenization_{row.name}.py"] = [row.tokenizer]
    for path, names in {**own, **stock}.items():
        # Without its source a library can tell nothing here; the first use of a missing class then fails.
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        if text is None and path in own:
            raise ValueError(f"backbone {row.name!r} needs the file {path.name} in models/, which does not exist")
        for name in names if text is not None else ():
            if not re.search(rf"^class {re.escape(name)}\b", str(text), re.MULTILINE):
                raise ValueError(f"backbone {row.name!r} names the class {name}, which {path.name} does not define")
