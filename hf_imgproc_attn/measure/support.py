"""Which models of Transformers can have a filter, and in which modes, measured on tiny models.

    imgproc-attn support docs/supported-models.md

Each cell of the table is a check that ran: in float64, with weights so large that attention is far from uniform. What
cannot work has to be refused by the package, with the reason. All else that goes wrong is a fault.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import plain_message
from ..markdown_tables import table_lines
from .page_table import measured, write_table, written_reasons
from .support_checks import (
    check_checkpointed,
    check_compiled,
    check_decoding,
    check_formula,
    check_lora,
    check_padded,
    check_saved,
)
from .support_models import ARCHITECTURES, AUDIO, DECODERS, ENCODER_DECODERS, ENCODERS, IMAGES, OUTSIDE

COMMAND = "imgproc-attn support docs/supported-models.md"
MARKS = ("<!-- supported: begin -->\n", "\n<!-- supported: end -->")
YES, NOTHING = "yes", "–"
_GROUPS = (
    ("decoders", DECODERS),
    ("encoders of texts", ENCODERS),
    ("encoder-decoders", ENCODER_DECODERS),
    ("audio", AUDIO),
    ("images", IMAGES),
    ("refused", OUTSIDE),
)


class Column(NamedTuple):
    """One column of the table.

    title: its head.
    has: whether an architecture has what the column is about, by its title.
    run: is called with the title; raises ValueError where the package refuses.
    meaning: what "yes" says, for below the table.
    """

    title: str
    has: Callable[[str], bool]
    run: Callable[[str], None]
    meaning: str


def measure(column: Column, title: str) -> str:
    """``"yes"``, ``"–"`` where the architecture has nothing of the kind, or the reason of a refusal.

    Raises:
        Exception: what is none of these: a fault.
    """
    if not column.has(title):
        return NOTHING
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of the libraries, about their own deprecated parts
            column.run(title)
    except ValueError as error:
        return plain_message(error)
    return YES


_CAUSAL = {*DECODERS, "Falcon", "Bloom", "MPT"}


def _any(title: str) -> bool:
    return True


def _sees_all(title: str) -> bool:
    return title not in _CAUSAL


def _decodes(title: str) -> bool:
    return title in _CAUSAL or title in ENCODER_DECODERS


def _is_text(title: str) -> bool:
    return title not in IMAGES and title not in ("Whisper", "SegFormer")


def _shares_keys(title: str) -> bool:
    fields = ARCHITECTURES[title][1]
    return "num_key_value_heads" in fields and fields["num_key_value_heads"] < fields["num_attention_heads"]


def _has_window(title: str) -> bool:
    return any(ARCHITECTURES[title][1].get(name) for name in ("sliding_window", "local_attention", "window_size"))


COLUMNS = (
    Column("full", lambda title: title not in DECODERS, check_formula, "attention to all tokens computes (2A − A²) V"),
    Column("causal", _decodes, check_formula, "likewise, where later tokens are hidden"),
    Column("padded", _is_text, check_padded, "likewise, with padding: on the left for decoders, else on the right"),
    Column("grouped", _shares_keys, check_formula, "likewise, where query heads share keys"),
    Column(
        "sliding",
        _has_window,
        check_formula,
        "likewise, where a token sees a window",
    ),
    Column(
        "cached",
        _decodes,
        lambda title: check_decoding(title, "dynamic"),
        "token by token with the model's own cache, the logits of the whole text at once",
    ),
    Column("static", _decodes, lambda title: check_decoding(title, "static"), "likewise, with a cache of fixed size"),
    Column(
        "compiled",
        _any,
        check_compiled,
        "the same under `torch.compile`: a decoder's step with a static cache is one graph, and so is every other "
        "model's pass, where it is without a filter",
    ),
    Column(
        "checkpointed",
        _any,
        check_checkpointed,
        "the same gradients with gradient checkpointing (`use_reentrant=False`), gains included",
    ),
    Column(
        "LoRA", _any, check_lora, "PEFT trains its adapter and the gains alone; merged, the model computes the same"
    ),
    Column("saved", _any, check_saved, "`save_pretrained`, and an Auto class brings back the same class and output"),
)


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """The table, and below it the reasons of what is refused and what the columns mean.

    Args:
        outcomes: (title of an architecture, of a column) -> what :func:`measure` found.
    """
    reasons = [outcome for outcome in dict.fromkeys(outcomes.values()) if outcome not in (YES, NOTHING)]
    rows = []
    for group, titles in _GROUPS:
        rows.append([f"**{group}**"])
        for title in titles:
            found = (outcomes[title, column.title] for column in COLUMNS)
            cells = (each if each in (YES, NOTHING) else f"no ({1 + reasons.index(each)})" for each in found)
            rows.append([title, *cells])
    lines = table_lines(["", *(column.title for column in COLUMNS)], rows)
    lines += ["", *(f"({number}) `{reason}`\n" for number, reason in enumerate(reasons, start=1))]
    lines += [f"- {column.title}: {column.meaning}" for column in COLUMNS]
    return "\n".join(lines)


def summary(outcomes: dict[tuple[str, str], str]) -> str:
    """The table in a paragraph, as the README has it."""
    works = {
        title for title in ARCHITECTURES if all(outcomes[title, column.title] in (YES, NOTHING) for column in COLUMNS)
    }
    refused = [title for title in ARCHITECTURES if title not in works]
    modes = [column.title for column in COLUMNS]
    return (
        f"{len(works)} architectures work in all modes that they have ({', '.join(modes)}); refused, with the reason: "
        f"{', '.join(refused)}."
    )


def read_table(text: str) -> dict[tuple[str, str], str]:
    """What :func:`table` was made of."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    reason = written_reasons(text)
    return {
        (row[0], column.title): cell if cell in (YES, NOTHING) else reason(cell)
        for row in rows
        if row[0] in ARCHITECTURES
        for column, cell in zip(COLUMNS, row[1:], strict=True)
    }


def write(page: Path) -> None:
    """Measure all, and put the table between the two marks of a page; errors as of :func:`.page_table.write_table`."""
    columns = {column.title: column for column in COLUMNS}
    write_table(page, MARKS, lambda: table(measured(ARCHITECTURES, columns, measure)))
