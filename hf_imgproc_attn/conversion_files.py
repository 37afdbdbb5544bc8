"""What belongs beside a converted model: its source's tokenizer or image processor, and its source's licence."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from .cards.filters import in_markdown, recorded
from .cards.merging import LIBRARY_TAG
from .hub.licences import licence_of_folder
from .models.image_processing_imgproc import ImgProcGreyImageProcessor

if TYPE_CHECKING:
    from .conversion import ConversionReport
    from .models.layer_summary import FilterSummary

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "NOTICE", "NOTICE.txt")


def copy_processor(source: str, folder: Path, num_channels: int = 3) -> None:
    """Save the source's tokenizer or image processor beside the model; a checkpoint without one is complete as it is.

    Asked by file: v5's ``AutoTokenizer`` invents an empty tokenizer where there is none.

    Args:
        source: a folder or a Hub name.
        folder: of the converted model.
        num_channels: of a model for images.
    """
    if any(_file_of(source, name) for name in _TOKENIZER_FILES):
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if has_image_processor(source):
        fitting_processor(AutoImageProcessor.from_pretrained(source), num_channels).save_pretrained(folder)


def has_image_processor(source: str) -> bool:
    """Whether a folder or Hub repository has an image processor."""
    return any(_file_of(source, name) for name in _IMAGE_PROCESSOR_FILES)


def fitting_processor(processor: Any, num_channels: int) -> Any:
    """The image processor that a model needs: of one channel ours, which makes grey of colour, else the given one.

    A stock processor leaves the three channels that a pipeline gives it.

    Args:
        processor: what the model was used with.
        num_channels: of the model.

    Raises:
        ValueError: for one channel, if the processor normalises each colour in its own way.
    """
    if num_channels != 1 or isinstance(processor, ImgProcGreyImageProcessor):
        return processor
    fields = {key: value for key, value in processor.to_dict().items() if not key.startswith("image_processor")}
    for name in ("image_mean", "image_std"):
        values = fields.get(name)
        if isinstance(values, list | tuple):
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name} of the image processor of a model with one channel must be one, got {[*values]}"
                )
            fields[name] = list(values[:1])
    return ImgProcGreyImageProcessor(**fields)


def write_card(source: str, folder: Path, report: ConversionReport, filters: FilterSummary) -> None:
    """Write a README.md with the source's licence, its name where it is one on the Hub, the report and the filters.

    The texts that the licence may refer to are copied too.

    Args:
        source: a folder or a Hub name.
        folder: of the converted model.
        report: of the conversion; its ``license`` is set.
        filters: the numbers of the model's filters.
    """
    from huggingface_hub import ModelCardData

    licence, is_local = _licence_of(source), os.path.isdir(source)
    for name in _LICENCE_FILES if licence else ():
        path = _file_of(source, name)
        if path is not None:
            shutil.copyfile(path, folder / name)
    report.license = str(licence.get("license", ""))
    name = Path(source).resolve().name if is_local else source  # a local path is nobody else's business
    front_matter = ModelCardData(
        **licence, library_name="transformers", base_model=None if is_local else source, tags=[LIBRARY_TAG]
    )
    body = (
        f"# {name}, converted to {report.variant}\n\n```text\n{dataclasses.replace(report, source=name)}\n```\n\n"
        f"## Numbers of the filters\n\n{in_markdown(recorded(filters))}\n"
    )
    (folder / "README.md").write_text(f"---\n{front_matter.to_yaml()}\n---\n\n{body}", encoding="utf-8")


def _licence_of(source: str) -> dict[str, Any]:
    """The licence keys of a card's front matter; of a Hub repository as far as its card can be had."""
    if os.path.isdir(source):
        return licence_of_folder(Path(source), ask_hub=True)
    path = _file_of(source, "README.md") or _file_of(source, "config.json")
    return {} if path is None else licence_of_folder(Path(path).parent, ask_hub=True)


def _file_of(source: str, name: str) -> str | None:
    """A file of a folder or of a Hub repository; None where there is none, or the Hub cannot be asked."""
    found: str | None = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found
