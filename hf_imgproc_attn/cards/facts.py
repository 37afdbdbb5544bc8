"""What a model card tells of a run beside its results: data, recipe, model, environment and limits.

Everything is read from a record that may be published (``records.public_record``); what it lacks reads
"not recorded".
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..backbones import OF_TASK, TASKS
from ..models.spec_axes import COMPARING_KERNELS, PUBLISHED_NEUTRENO_LAMBDAS
from ..models.spec_fields import PRESETS, FilterSpecMixin, closest_preset, preset_name, written_out_defaults
from ..models.spec_versions import bring_up_to_date
from ..training_support.arguments import (
    BUILT_IN_DATA,
    EMBEDDED_IMAGES,
    EMBEDDED_MASKS,
    EMBEDDED_PAIRS,
    EMBEDDED_TEXT,
    GENERATED_ANSWERS,
    GENERATED_CLASSES,
)
from .filters import NOTHING_LEARNED, in_markdown, lens_in_markdown
from .results import NOT_MEASURED, Measurement

NOT_RECORDED = "not recorded"
OF_PIXELS = "semantic-segmentation"

Facts = list[tuple[str, str]]

_PRECISIONS = {"bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}
# Label, and the fields that a configuration may have for it, the first one that it has.
_MODEL_FIELDS = (
    ("layers", ("num_hidden_layers", "n_layer")),
    ("heads", ("num_attention_heads", "n_head")),
    ("width", ("hidden_size", "n_embd")),
    ("width of the MLP", ("intermediate_size", "n_inner")),
    ("image size (pixels)", ("image_size",)),
    ("patch size (pixels)", ("patch_size",)),
    ("channels", ("num_channels",)),
    ("positions", ("n_positions", "max_position_embeddings")),
    ("vocabulary", ("vocab_size",)),
    ("dropout", ("hidden_dropout_prob", "resid_pdrop")),
    ("dropout of the attention", ("attention_probs_dropout_prob", "attn_pdrop")),
)
_LAYER_FACTS = ("stack", "layer", "content", "positions", "boosting", "feedback", "parameters")
_ADAPTER_OPTIONS = ("rank", "alpha", "dropout", "targets")
_DATA_OPTIONS = (
    ("dataset_revision", "revision of the data set"),
    ("random_crop_padding", "random crop, padding (pixels)"),
    ("horizontal_flip", "random mirror image"),
    ("random_scale", "random enlarging or shrinking, at most by the factor (1: none)"),
    ("reduce_labels", "masks count from 1, 0 is no class"),
    ("ignore_index", "label of pixels that do not count"),
    ("max_train_samples", "training samples used at most"),
    ("max_eval_samples", "validation and test samples used at most"),
    ("block_size", "tokens in a training sample"),
    ("max_length", "tokens of a text that are read"),
    ("tokenizer_name", "tokenizer"),
    ("tokenizer_vocab_size", "vocabulary of a tokenizer trained for the run"),
)


def variant_of(record: dict[str, Any]) -> str:
    """The preset whose filter the model has, or varies in some fields; else ``custom``."""
    return closest_preset(_configuration(record))[0]


def is_stock(record: dict[str, Any]) -> bool:
    """Whether the filter is that of the stock model."""
    return preset_name(_configuration(record)) == "softmax"


def filter_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of the filter specification; one that an older record lacks is at its default."""
    config = bring_up_to_date(record["model_config"])
    return {name: config.get(name, getattr(FilterSpecMixin, name)) for name in FilterSpecMixin.__annotations__}


def changed_fields(record: dict[str, Any]) -> list[list[str]]:
    """Fields of the filter with their values and those of the preset in which the model differs from it.

    A model without a preset, ``custom``, is compared with the stock model.
    """
    config = _configuration(record)
    name, changes = closest_preset(config)
    defaults = {} if name == "custom" else written_out_defaults(config)
    rows = []
    for field, value in changes.items():
        before = PRESETS.get(name, {}).get(field, getattr(FilterSpecMixin, field))
        rows.append([field, str(value), str(defaults.get(field) if before is None else before)])
    return rows


def _configuration(record: dict[str, Any]) -> SimpleNamespace:
    """The filter's fields, and the strength that its kind of data has by default."""
    fields = filter_fields(record)
    fields["default_neutreno_lambda"] = PUBLISHED_NEUTRENO_LAMBDAS[2 if _has_class_token(record) else 1]
    return SimpleNamespace(**fields)


def _has_class_token(record: dict[str, Any]) -> bool:
    """Whether the model is a ViT, of images and with a class token."""
    return "image_size" in record["model_config"]


def model_title(record: dict[str, Any]) -> str:
    """What the model is, as a card begins."""
    applied = record.get("applied_filter")
    return OF_TASK[record["task"]].card_title if applied is None else f"A model of the class {applied['architecture']}"


def filtered_layers(record: dict[str, Any]) -> list[list[str]]:
    """The filtered layers of a model that keeps its stock class, below a header; empty for other models."""
    layers = record.get("applied_filter", {}).get("layers", [])
    names = [name for name in _LAYER_FACTS if layers and name in layers[0]]
    return [names, *([str(layer[name]) for name in names] for layer in layers)] if layers else []


def filter_numbers(record: dict[str, Any]) -> str:
    """The filters' bandwidths, gains and logits at the end of the training, in Markdown; older records have none.

    Below them what the attention did with samples at the end, where the run looked (``lens_every``).
    """
    seen = record.get("lens_history")
    return "\n\n".join([_filter_numbers(record), *([lens_in_markdown(seen)] if seen else [])])


def _filter_numbers(record: dict[str, Any]) -> str:
    if "filter_summary" in record:
        return in_markdown(record["filter_summary"])
    fields = filter_fields(record)
    learns = (
        fields["learn_bandwidths"]
        or fields["learn_feedback"]
        or "learned" in _as_list(fields["boosting"])
        or "relative_buckets" in _as_list(fields["position_kernel"])
        or (_has_class_token(record) and compares_positions(record))
    )
    return "What the filters have learned beside their projections is not recorded." if learns else NOTHING_LEARNED


def compares_positions(record: dict[str, Any]) -> bool:
    """Whether positions enter through the attention logits of a layer instead of being added to the tokens."""
    return bool(set(COMPARING_KERNELS) & set(_as_list(filter_fields(record)["position_kernel"])))


def hub_name(record: dict[str, Any], part: str, option: str) -> str | None:
    """The value of an option if it is a Hub name: neither a local path nor data embedded in a Python package."""
    name = record["arguments"][part].get(option)
    is_local = option in record["local_paths"] or name in BUILT_IN_DATA
    return None if is_local else name


def dataset_title(record: dict[str, Any]) -> str:
    """The data set in words."""
    data = record["arguments"]["data"]
    name = str(data["dataset_name"])
    if name == EMBEDDED_IMAGES:
        return "scikit-learn's digits"
    if name == EMBEDDED_MASKS:
        return "scikit-learn's digits on photographs of scikit-image"
    if name == EMBEDDED_TEXT:
        return f"the manual of Python {record.get('versions', {}).get('python', '')}".rstrip() + " (pydoc_data.topics)"
    if name == EMBEDDED_PAIRS:
        python, seed = record.get("versions", {}).get("python", ""), data.get("sequence_seed")
        return f"pairs of paragraphs, of one topic or not, of the manual of Python {python} (pydoc_data, seed {seed})"
    if name in BUILT_IN_DATA:
        return f"{name}, generated by hf_imgproc_attn.sequences (seed {data.get('sequence_seed')})"
    title = f"{name}, {data['dataset_config_name']}" if data.get("dataset_config_name") else name
    return title if hub_name(record, "data", "dataset_name") else f"{title} (local data)"


def example_sequence(record: dict[str, Any]) -> str | None:
    """What a model of long sequences can be asked, as words; None for a model of something else, or of pairs."""
    name = record["arguments"]["data"]["dataset_name"]
    if record["model_config"].get("classifier_pairs"):
        return None
    if record["task"] == "sequence-classification":
        return "[MAX 2 9 4 ]" if name in GENERATED_CLASSES else "0 128 255"
    if record["task"] == "recall":
        return "3 _ _ 1 _ 3 >" if name == "selective_copying" else "k1 v2 k3 v1 k1"
    return None


def split_table(record: dict[str, Any]) -> list[list[str]]:
    """The size of every split and the start of its fingerprint, below a header."""
    fingerprints = record.get("data_fingerprint", {})
    counted = [name for name in ("rows", "words", "tokens") if any(name in counts for counts in fingerprints.values())]
    table = [["split", *counted, "fingerprint (start)"]]
    for split in ("train", "validation", "test"):
        if (counts := fingerprints.get(split)) is not None:
            digest = str(counts.get("sha256") or counts.get("datasets_fingerprint") or NOT_RECORDED)[:16]
            table.append([split, *(_count(counts.get(name)) for name in counted), digest])
    return table


def command(record: dict[str, Any]) -> str:
    """The command line of the run, which needs no YAML file."""
    words = record.get("command")
    return NOT_RECORDED if words is None else shlex.join(["imgproc-attn", TASKS[record["task"]].command, *words])


def hyper_parameters(record: dict[str, Any]) -> Facts:
    """Model, optimiser, schedule, batch, precision and data options."""
    config, options, data = record["model_config"], record["arguments"]["trainer"], record["arguments"]["data"]
    facts: Facts = []
    for label, names in _MODEL_FIELDS:
        name = next((name for name in names if name in config), None)
        if name == "n_inner" and config[name] is None:  # the library's default
            facts.append((label, f"{4 * config['n_embd']} (4 x width)"))
        elif name is not None:
            facts.append((label, str(config[name])))
    if record["task"] == OF_PIXELS:
        facts.append(("head", _text(config, "segmentation_head")))
    facts.append(("parameters", _count(record.get("parameters", {}).get("total"))))
    start = record["arguments"]["model"].get("model_name_or_path")
    facts.append(("weights start from", "random numbers" if start is None else start))
    facts += _adapters(record)
    facts += [
        ("optimiser", _text(options, "optim")),
        ("beta1, beta2, epsilon", ", ".join(_text(options, f"adam_{name}") for name in ("beta1", "beta2", "epsilon"))),
        ("learning rate (highest)", _text(options, "learning_rate")),
        ("schedule", _text(options, "lr_scheduler_type")),
        ("warm-up", _warm_up(options.get("warmup_steps"))),
        ("weight decay", _text(options, "weight_decay")),
        ("gradient norm clipped at", _text(options, "max_grad_norm")),
        ("label smoothing", _text(options, "label_smoothing_factor")),
        ("optimiser steps", _count(record.get("steps"))),
        ("epochs", _text(record.get("metrics", {}).get("train", {}), "epoch")),
        ("batch (samples a step)", _batch(record)),
        ("precision", next((text for name, text in _PRECISIONS.items() if options.get(name)), "float32")),
        ("seed", _text(record, "seed")),
    ]
    facts += [(label, str(data[name])) for name, label in _DATA_OPTIONS if data.get(name) not in (None, False, 0)]
    if data["dataset_name"] not in BUILT_IN_DATA:
        label = "part of the training data held out where there is no validation split"
        facts.append((label, _text(data, "validation_fraction")))
    return facts


def _adapters(record: dict[str, Any]) -> Facts:
    """What was trained in place of the weights; empty where the weights were."""
    model = record["arguments"]["model"]
    if model.get("peft") is None:
        return []
    given = [f"{name} {model[f'peft_{name}']}" for name in _ADAPTER_OPTIONS if model.get(f"peft_{name}") is not None]
    end = ["merged into the weights" if model.get("peft_merge") else "saved beside the model"]
    return [
        ("adapters", ", ".join([model["peft"], *given, *end])),
        ("parameters that are trained", _count(record.get("parameters", {}).get("trained"))),
    ]


def environment(record: dict[str, Any], robustness: dict[str, Any] | None) -> Facts:
    """Device, time, versions and the state of the source, of training and of evaluation on disturbed inputs."""
    device = record.get("device", {})
    git = record.get("git")
    changed = "" if git is None else ", with uncommitted changes" if git["dirty"] else ", without uncommitted changes"
    versions = [f"{name} {version}" for name, version in sorted(record.get("versions", {}).items()) if version]
    facts = [
        ("device", _device(device)),
        ("platform", _text(device, "platform")),
        ("processes", _text(device, "processes")),
        ("threads a process", _text(device, "threads")),
        ("training time", _seconds(record.get("training_seconds"))),
        ("energy", NOT_MEASURED),
        ("versions", ", ".join(versions) or NOT_RECORDED),
        ("git revision of hf_imgproc_attn", NOT_RECORDED if git is None else f"{git['revision']}{changed}"),
    ]
    facts += _earlier_sessions(record)
    if robustness is not None:
        time, where = _seconds(robustness.get("seconds")), _device(robustness.get("device", {}))
        revision = (robustness.get("git") or {}).get("revision")
        same = "the same" if git and revision == git["revision"] else revision or NOT_RECORDED
        facts.append(("evaluation on disturbed inputs", f"{time} on {where}; git revision: {same}"))
    return facts


def _earlier_sessions(record: dict[str, Any]) -> Facts:
    """What was different before a run was resumed: its device, versions and source."""
    facts: Facts = []
    sessions = record.get("sessions") or []
    for number, (session, following) in enumerate(pairwise(sessions), start=1):
        before = {name: _environment_text(session, name) for name in ("device", "git", "versions")}
        last = {name: _environment_text(sessions[-1], name) for name in before}
        different = [text for name, text in before.items() if text != last[name]]
        until = Path(str(following.get("resumed_from"))).name
        text = "; ".join(different) or "the same device, versions and source"
        facts.append((f"session {number}, until {until}", text))
    return facts


def _environment_text(session: dict[str, Any], name: str) -> str:
    value = session.get(name) or {}
    if name == "device":
        return f"{_device(value)}, {_text(value, 'platform')}, {_text(value, 'threads')} threads a process"
    if name == "git":
        changed = ", with uncommitted changes" if value.get("dirty") else ""
        return f"git revision {value.get('revision', NOT_RECORDED)}{changed}"
    return ", ".join(f"{package} {version}" for package, version in sorted(value.items()) if version)


def limits(record: dict[str, Any], rows: Sequence[Measurement]) -> list[str]:
    """What the numbers cannot show, as far as the record tells."""
    texts = []
    if "seed" in record:
        texts.append(
            f"One training run (seed {record['seed']}): no confidence interval. A difference between two columns of "
            "the table may be chance."
        )
    for row in rows:
        if row.family == "clean" and row.split == "test" and row.metric == "accuracy" and row.value and row.samples:
            error = 100 * math.sqrt(max(row.value * (1 - row.value), 0.0) / row.samples)
            texts.append(
                f"With {row.samples:,} test {row.unit} the clean accuracy has a standard error of {error:.1f} "
                f"percentage points from the choice of these {row.unit} alone (binomial)."
            )
            break
    name = record["arguments"]["data"]["dataset_name"]
    counts = record.get("data_fingerprint", {}).get("train", {})
    size = f" ({counts['rows']:,} training {TASKS[record['task']].rows})" if "rows" in counts else ""
    if record["task"] == OF_PIXELS:
        side = record["arguments"]["data"].get("image_size") or record["model_config"].get("image_size")
        texts.append(
            f"Predictions were compared with masks in the size that both were resized to ({side} pixels a side), not "
            "in the sizes of the images, and images were not cut into windows."
        )
    if name in (EMBEDDED_IMAGES, EMBEDDED_MASKS, EMBEDDED_TEXT, EMBEDDED_PAIRS):
        texts.append(
            f"The data are a small set that comes with a Python package{size}: the checkpoint shows how the method is "
            "used, it is not meant for use itself."
        )
    if name in (*GENERATED_CLASSES, *GENERATED_ANSWERS):
        texts.append("The sequences are made by a program: the checkpoint shows what its filters learn, no more.")
    if name in (EMBEDDED_TEXT, EMBEDDED_PAIRS):
        texts.append("The manual changes with Python, so another version gives other data and other numbers.")
    missing = [row.name for row in rows if row.value is None and row.family in TASKS[record["task"]].disturbances]
    untested = f" Not measured among these: {', '.join(missing)}." if missing else ""
    texts.append(f"Nothing was tested but what the table of results shows, on the data set named there.{untested}")
    if record["arguments"]["trainer"].get("load_best_model_at_end"):
        texts.append("The checkpoint was chosen by its validation score, which is therefore optimistic.")
    elif "steps" in record:
        steps = f"{record['steps']:,}"
        texts.append(f"The weights are those after the last step ({steps}), not the best on the validation split.")
    if (record.get("git") or {}).get("dirty"):
        texts.append("The source had uncommitted changes: the git revision alone does not reproduce the run.")
    if record.get("resumed_from"):
        texts.append("The run was interrupted and resumed: the training time leaves out what a killed session spent.")
    if record["local_paths"]:
        names = ", ".join(record["local_paths"])
        texts.append(f"Something local was used ({names}), which the command above does not find elsewhere.")
    return texts


def costs(record: dict[str, Any], other: dict[str, Any] | None) -> list[list[str]]:
    """Parameters and training time, beside the baseline's where there is one."""
    columns = [["parameters", "training time (what else the machine did is not recorded)"]]
    for run in (record, other):
        if run is not None:
            columns.append([_count(run.get("parameters", {}).get("total")), _seconds(run.get("training_seconds"))])
    return [list(row) for row in zip(*columns, strict=True)]


def _seconds(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,.0f} s"


def _device(device: dict[str, Any]) -> str:
    return f"{device['name']} ({device.get('type')})" if "name" in device else NOT_RECORDED


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        return NOT_RECORDED
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(value: int | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,}"


def _warm_up(steps: float | None) -> str:
    if steps is None:
        return NOT_RECORDED
    return f"{100 * steps:g} % of the steps" if 0 < steps < 1 else f"{steps:g} steps"


def _batch(record: dict[str, Any]) -> str:
    options = record["arguments"]["trainer"]
    numbers = (
        options.get("per_device_train_batch_size"),
        record.get("device", {}).get("processes"),
        options.get("gradient_accumulation_steps"),
    )
    if None in numbers:
        return NOT_RECORDED
    return f"{math.prod(numbers):,} (a process {numbers[0]}, processes {numbers[1]}, accumulated {numbers[2]})"
