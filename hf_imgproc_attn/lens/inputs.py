"""What a model is shown: a user's files, or real data that comes with Python and its packages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from ..conversion_probe import _pixel_statistics, longest_text, sample_texts
from ..errors import UsageError, broken_files, plain_message, refuse_missing_path, require_extras
from ..images.photographs import PHOTOGRAPHS, load_photograph
from ..models.layer_grid import sides
from .report import counted

DATA = ("auto", "pydoc", "own", "random", "photographs", "digits")
"""Names of ``--data``: texts of the manual inside Python, texts that the model itself writes, random tokens,
photographs of scikit-image, handwritten digits of scikit-learn; auto: the first that fits the model."""
SAMPLES, TEXT_LENGTH = 16, 64
WRITTEN = "texts that the model itself wrote"
"""How such inputs are described."""


class Shown(NamedTuple):
    """Inputs by name, what they are in words, the first sample's tokens as text, and what a reader must know of them.

    notes: of a comparison whose models do not see the same.
    """

    inputs: dict[str, torch.Tensor]
    described: str
    labels: list[str]
    notes: tuple[str, ...] = ()


def load_config(checkpoint: str) -> Any:
    """The configuration of a folder or the Hub.

    Raises:
        UsageError: for what is no checkpoint.
    """
    refuse_missing_path("MODEL", checkpoint)
    try:
        return transformers.AutoConfig.from_pretrained(checkpoint)
    except broken_files() as error:
        raise UsageError(f"MODEL {checkpoint!r} cannot be loaded: {plain_message(error)}") from error


def load_model(checkpoint: str) -> nn.Module:
    """A model of a folder or the Hub, in evaluation mode, with its own weights everywhere in its layers.

    Raises:
        UsageError: for what is no checkpoint, or one whose layers lack weights.
    """
    config = load_config(checkpoint)
    try:
        names = list(getattr(config, "architectures", None) or [""])
        writes = names[0].endswith(("LMHeadModel", "ForCausalLM"))
        door = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
        with _quietly():
            model, found = door.from_pretrained(checkpoint, output_loading_info=True)
    except broken_files() as error:
        raise UsageError(f"MODEL {checkpoint!r} cannot be loaded: {plain_message(error)}") from error
    missing = sorted(name for name in found["missing_keys"] if any(part.isdigit() for part in name.split(".")))
    if missing:
        raise UsageError(f"MODEL {checkpoint!r} lacks weights of its layers, such as {missing[0]}")
    loaded: nn.Module = model.eval()
    return loaded


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the report of heads that are left out on purpose; what is missing in layers is refused."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def show(
    model: nn.Module,
    checkpoint: str,
    *,
    files: Sequence[str] = (),
    text: str | None = None,
    data: str = "auto",
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
) -> Shown:
    """Inputs for a model.

    Args:
        model: the model.
        checkpoint: where its tokenizer or image processor is.
        files: texts, token numbers (JSON: a list of lists) or images; none: ``text`` or ``data``.
        text: a text, or token numbers as JSON; None: ``data``.
        data: see :data:`DATA`.
        samples: how many.
        length: tokens of a text; None: 64, or fewer where the model has fewer places.
        seed: of what is drawn.

    Raises:
        UsageError: for files or data that do not fit the model.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be an integer >= 1, got {value!r}")
    if data not in DATA:
        raise UsageError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    kind = getattr(model, "main_input_name", "")
    if kind == "pixel_values":
        if text is not None:
            raise UsageError(f"{checkpoint!r} takes images, got a text")
        return _images(model, checkpoint, files, data, samples, seed)
    if kind != "input_ids":
        raise UsageError(f"{checkpoint!r} takes {kind or 'other inputs'}: the command shows texts and images only")
    return _texts(model, checkpoint, files if text is None else text, data, samples, length, seed)


def with_company(model: nn.Module, checkpoint: str, shown: Shown, beside: int, seed: int = 0) -> Shown:
    """What a user gave first, and real data of the same size behind it.

    Args:
        model, checkpoint, seed: as of :func:`show`.
        shown: what the user gave.
        beside: so many samples; they let position and content be told apart.
    """
    if not beside:
        return shown
    ids = shown.inputs.get("input_ids")
    more = show(model, checkpoint, samples=beside, length=None if ids is None else ids.shape[-1], seed=seed)
    inputs = {name: torch.cat((value, more.inputs[name])) for name, value in shown.inputs.items()}
    number = len(next(iter(more.inputs.values())))
    described = f"{shown.described}, and beside it {counted(number, 'sample')} of {more.described}"
    return Shown(inputs, described, shown.labels)


# --------------------------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------------------------


def _texts(
    model: Any, checkpoint: str, given: Sequence[str] | str, data: str, samples: int, length: int | None, seed: int
) -> Shown:
    """``given``: files, or a text itself; where it is empty, ``data`` says what is shown."""
    config = model.config.get_text_config()
    longest = longest_text(config)
    if length is not None and length > longest:
        raise UsageError(f"length must be at most {longest}, the places of {checkpoint!r}, got {length}")
    length = length or min(TEXT_LENGTH, longest)
    tokenizer = tokenizer_of(checkpoint)
    if given:
        ids, described = _given(given, tokenizer, checkpoint, length, samples)
    elif data in ("photographs", "digits"):
        raise UsageError(f"data={data!r} is for image models, and {checkpoint!r} takes texts")
    elif data == "random" or (data == "auto" and tokenizer is None and not _writes(model)):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config.vocab_size, (samples, length), generator=generator)
        described = "random tokens"
    elif data == "own" or (data == "auto" and tokenizer is None):
        if not _writes(model):
            raise UsageError(f"data='own' needs a model that writes texts, got {type(model).__name__}")
        ids = _own_texts(model, samples, length, seed)
        described = WRITTEN
    else:
        ids, described = _pydoc(tokenizer, checkpoint, length, samples)
    if int(ids.max()) >= config.vocab_size or int(ids.min()) < 0:
        raise UsageError(f"token numbers must be from 0 to {config.vocab_size - 1} for {checkpoint!r}")
    labels = [str(int(token)) for token in ids[0]]
    if tokenizer is not None:
        labels = [tokenizer.decode([int(token)]) for token in ids[0]]
    return Shown({"input_ids": ids}, described, labels)


def tokenizer_of(checkpoint: str) -> Any:
    """The tokenizer beside a checkpoint, or None."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        # Without files some classes make a tokenizer that knows no word.
        return tokenizer if tokenizer("a word", add_special_tokens=False)["input_ids"] else None
    except Exception:
        # Whatever a library says of files that are not there: the model is shown something else, and that is said.
        return None


def _writes(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))


def _own_texts(model: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[torch.Tensor] = []
    while sum(len(part) for part in drawn) < samples:
        drawn.append(sample_texts(model, generator, length).cpu())
    return torch.cat(drawn)[:samples]


def _pydoc(tokenizer: Any, checkpoint: str, length: int, samples: int) -> tuple[torch.Tensor, str]:
    if tokenizer is None:
        raise UsageError(f"data='pydoc' needs a tokenizer, and there is none beside {checkpoint!r}")
    from pydoc_data.topics import topics

    lines = "\n".join(topics[title] for title in sorted(topics)).splitlines()
    text = "\n".join(line for line in lines if any(character.isalnum() for character in line))
    return _cut(_encode(tokenizer, text[: 40 * length * samples]), length, samples), "the manual inside Python"


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(" ".join(text.split()), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _cut(ids: list[int], length: int, samples: int) -> torch.Tensor:
    if len(ids) < 2:
        raise UsageError(f"a text must have at least 2 tokens, got {len(ids)}: a filter of one token returns it")
    if len(ids) < length:
        return torch.tensor([ids])
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:samples]


def _given(
    given: Sequence[str] | str, tokenizer: Any, checkpoint: str, length: int, samples: int
) -> tuple[torch.Tensor, str]:
    """Token numbers of files or of a text, and what they are in words."""
    if isinstance(given, str):
        texts, described = {"text": given}, "the given text"
        is_json = given.lstrip().startswith("[[")
    else:
        texts = {f"input {file!r}": _read_text(file) for file in given}
        described, is_json = (
            ", ".join(Path(file).name for file in given),
            all(file.endswith(".json") for file in given),
        )
    if is_json:
        rows = [row for name, text in texts.items() for row in _token_rows(name, text)]
        shortest = min(len(row) for row in rows)
        if shortest < 2:
            raise UsageError("a text must have at least 2 tokens, got 1: a filter of one token returns it")
        return torch.tensor([row[: min(shortest, length)] for row in rows[:samples]]), described
    if tokenizer is None:
        raise UsageError(
            f"texts need a tokenizer, and there is none beside {checkpoint!r}: give token numbers as JSON"
        )
    return _cut(_encode(tokenizer, "\n".join(texts.values())), length, samples), described


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UsageError(f"input {file!r} cannot be read: {reason} (--input takes files)") from error


def _token_rows(name: str, text: str) -> list[list[int]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} must be JSON: {error}") from error
    fits = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
    if not fits or any(isinstance(token, bool) or not isinstance(token, int) for row in rows for token in row):
        raise UsageError(f"{name} must be a list of lists of token numbers")
    found: list[list[int]] = rows
    return found


# --------------------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------------------


def _images(model: Any, checkpoint: str, files: Sequence[str], data: str, samples: int, seed: int) -> Shown:
    config = model.config
    config = getattr(config, "vision_config", config)
    channels = getattr(config, "num_channels", 3)
    if getattr(config, "image_size", None) is None:
        raise UsageError(f"{checkpoint!r} must have an image_size in its configuration")
    height, width = sides(config.image_size)
    if not files and data in ("pydoc", "own"):
        raise UsageError(f"data={data!r} is for models of texts, and {checkpoint!r} takes images")
    if not files and data == "random":
        pixels = torch.rand(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
        described = "random pixels"
    elif files:
        pixels = torch.cat([_fitted(load_photograph(file).pixels, channels, height, width) for file in files])[
            :samples
        ]
        described = ", ".join(Path(file).name for file in files)
    elif data == "digits" or (data == "auto" and channels == 1):
        require_extras("train")
        from sklearn.datasets import load_digits

        scans = torch.from_numpy(load_digits().images[:samples]).float() / 16
        pixels = nn.functional.interpolate(scans[:, None], size=(height, width), mode="nearest")
        pixels, described = pixels.expand(-1, channels, -1, -1), "handwritten digits"
    else:
        require_extras("filters")
        pixels, described = _photographs(channels, height, width, samples), "photographs"
    mean, std, _ = _pixel_statistics(checkpoint, channels)
    pixels = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    return Shown({"pixel_values": pixels.to(model.dtype)}, described, [])


def _photographs(channels: int, height: int, width: int, samples: int) -> torch.Tensor:
    """Crops of the photographs of scikit-image: the middle, then the corners."""
    crops: list[torch.Tensor] = []
    for where in range(5):
        for name in PHOTOGRAPHS:
            if len(crops) == samples:
                return torch.cat(crops)
            pixels = load_photograph(name).pixels
            side = min(pixels.shape[:2]) * (4 if where == 0 else 2) // 4
            rows, columns = (n - side for n in pixels.shape[:2])
            top, left = ((rows // 2, columns // 2), (0, 0), (0, columns), (rows, 0), (rows, columns))[where]
            crops.append(_fitted(pixels[top : top + side, left : left + side], channels, height, width))
    return torch.cat(crops)


def _fitted(pixels: Any, channels: int, height: int, width: int) -> torch.Tensor:
    """A picture from 0 to 255, grey or with colours, as ``[1, channels, height, width]`` from 0 to 1."""
    image = torch.from_numpy(pixels).float() / 255
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[-1] != channels:
        image = image.mean(-1, keepdim=True).expand(-1, -1, channels)
    image = image.permute(2, 0, 1)[None]
    return nn.functional.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
