"""What the Hub demands of the front matter of a model card, and what it derives from it.

Sources: ``modelcard.md`` and ``docs/hub/repositories-licenses.md`` of huggingface/hub-docs, and the keys of
``PIPELINE_DATA`` in huggingface/huggingface.js. The Hub adds to both lists, so what is refused here may one day be
allowed there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)")

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
_PIPELINE_TAGS = """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction
    image-segmentation image-text-to-text image-to-3d image-to-image image-to-text image-to-video keypoint-detection
    mask-generation multiple-choice object-detection other question-answering reinforcement-learning robotics
    sentence-similarity summarization table-question-answering table-to-text tabular-classification tabular-regression
    tabular-to-text text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio
    text-to-image text-to-speech text-to-video time-series-forecasting token-classification translation
    biology text2text-generation
    unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
    visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection
"""
LICENSES, PIPELINE_TAGS = frozenset(_LICENSES.split()), frozenset(_PIPELINE_TAGS.split())
_NO_METADATA = "empty or missing yaml metadata in repo card"


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, as it is for the Hub's parser."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicated mapping key {min(repeated)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def front_matter(card: str) -> Any:
    """The parsed front matter of a card; None where there is none.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    match = _FRONT_MATTER.match(card)
    return yaml.load(match[1], Loader=_StrictLoader) if match else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the Hub about a card."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if data is None:
        return [], [_NO_METADATA]
    if not isinstance(data, dict):
        return [f"YAML Metadata Error: must be a mapping, got {type(data).__name__}"], []
    return list(_errors(data)), []


def _errors(data: dict[str, Any]) -> Iterator[str]:
    for key in ("pipeline_tag", "library_name", "license_name", "license_link"):
        if key in data and not _is_text(data[key]):
            yield f'"{key}" must be a string'
    for key in ("license", "datasets", "base_model", "language", "metrics"):
        if key in data and not (_is_text(data[key]) or _is_texts(data[key])):
            yield f'"{key}" must be a string or a list of strings'
    if "tags" in data and not _is_texts(data["tags"]):
        yield '"tags" must be a list of strings'
    for identifier in as_list(data.get("license")):
        if identifier not in LICENSES:
            yield f'"license" must be one of {sorted(LICENSES)}, got {identifier!r}'
    if _is_text(data.get("pipeline_tag")) and data["pipeline_tag"] not in PIPELINE_TAGS:
        yield f'"pipeline_tag" must be one of {sorted(PIPELINE_TAGS)}, got {data["pipeline_tag"]!r}'
    for key in ("base_model", "datasets"):
        for name in as_list(data.get(key)):
            if _is_text(name) and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
                yield f'"{key}" with value {name!r} is not valid: use an id from the Hub'
    if "model-index" in data:
        yield from _model_index_errors(data["model-index"])


def _model_index_errors(index: Any) -> Iterator[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict):
            yield f'"{where}" must be a mapping'
            continue
        yield from _texts_required(model, where, "name")
        if not isinstance(model.get("results"), list):
            yield f'"{where}.results" must be an array'
            continue
        for j, result in enumerate(model["results"]):
            yield from _result_errors(result, f"{where}.results[{j}]")


def _result_errors(result: Any, where: str) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f'"{where}" must be a mapping'
        return
    yield from _texts_required(result.get("task"), f"{where}.task", "type")
    yield from _texts_required(result.get("dataset"), f"{where}.dataset", "type", "name")
    if "source" in result:
        yield from _texts_required(result["source"], f"{where}.source", "url")
    metrics = result.get("metrics")
    if not isinstance(metrics, list):
        yield f'"{where}.metrics" must be an array'
        return
    for k, metric in enumerate(metrics):
        at = f"{where}.metrics[{k}]"
        yield from _texts_required(metric, at, "type")
        value = metric.get("value") if isinstance(metric, dict) else None
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (number or _is_text(value)):
            yield f'"{at}.value" must be a finite number or a string, got {value!r}'


def _texts_required(mapping: Any, where: str, *keys: str) -> Iterator[str]:
    if not isinstance(mapping, dict):
        yield f'"{where}" must be a mapping'
        return
    for key in keys:
        if not _is_text(mapping.get(key)):
            yield f'"{where}.{key}" must be a string'


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def as_list(value: Any) -> list[Any]:
    """A field that may hold one value or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def derived_tags(card: dict[str, Any], config: dict[str, Any], paths: list[str]) -> list[str]:
    """The tags by which the Hub finds a model: those of its card, its files and its configuration."""
    tags = [card["library_name"]] if "library_name" in card else []
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []
    tags += [config["model_type"]] if "model_type" in config else []
    tags += as_list(card.get("pipeline_tag")) + as_list(card.get("tags")) + as_list(card.get("language"))
    tags += ["custom_code"] if "auto_map" in config else []
    for key, prefix in (("datasets", "dataset"), ("base_model", "base_model"), ("license", "license")):
        tags += [f"{prefix}:{value}" for value in as_list(card.get(key))]
    return list(dict.fromkeys([*tags, "region:us"]))
