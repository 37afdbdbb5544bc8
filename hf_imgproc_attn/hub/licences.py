"""Under which licence a checkpoint may be published: never one that nobody chose.

In this order: what the user says (``--license``, of ``publish`` or of the training command), the licence of the
checkpoint that the run started from, for a run from scratch that of its data, else none. A licence is looked up where
the base checkpoint or the data are: in their card or configuration, in a folder or on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cards.facts import hub_name
from ..cards.merging import front_matter_of
from ..errors import UsageError
from ..records import FILE_NAME, public_record
from ..training_support.arguments import BUILT_IN_DATA
from .client import connect, patiently

_KEYS = ("license", "license_name", "license_link")
_LONGEST_CHAIN = 8
"""So many runs may have started one from the other."""

Look = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Licence:
    """The licence of a checkpoint.

    Attributes:
        keys: of a card's front matter: ``license``, and ``license_name`` and ``license_link`` where the source has
            them; empty where no licence is known.
        origin: where it comes from, in words.
        is_given: whether the user named it.
        is_pending: whether the Hub, which was not asked, may know one.
        remarks: what the user should know about it, one sentence each.
    """

    keys: dict[str, Any]
    origin: str
    is_given: bool = False
    is_pending: bool = False
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.keys:
            return "none was given, and none of a base model or of the data is known"
        named = self.keys["license"]
        return f"{', '.join(named) if isinstance(named, list) else named} ({self.origin})"


def find_licence(record: dict[str, Any], given: str | None, *, ask_hub: bool, chain: int = _LONGEST_CHAIN) -> Licence:
    """The licence for a run's checkpoint.

    Args:
        record: the content of the run's ``run.json``, with its local paths.
        given: the user's ``--license``.
        ask_hub: whether the Hub may be asked for the licence of a base model or data set that is there.
        chain: how many runs that started one from the other may be followed.
    """
    arguments = record["arguments"]
    trained_with = arguments.get("run", {}).get("license")
    if named := given or trained_with:
        return Licence({"license": named}, f"--license{'' if given else ' of the training command'}", True)
    start, data = arguments["model"].get("model_name_or_path"), arguments["data"].get("dataset_name")
    public, remarks, pending = public_record(record), list[str](), list[str]()

    def look(part: str, option: str, describe: Look) -> dict[str, Any]:
        name = hub_name(public, part, option)
        if name is None:
            return licence_of_folder(Path(str(arguments[part][option])), ask_hub=ask_hub, chain=chain - 1)
        if not ask_hub:
            pending.append(name)
            remarks.append(f"the licence of {name} is asked from the Hub when the run is published")
            return {}
        try:
            return _known(describe(name))
        except UsageError as error:
            remarks.append(f"the licence of {name} could not be asked: {error}")
            return {}

    embedded = data in (None, "", *BUILT_IN_DATA)
    of_data = {} if embedded else look("data", "dataset_name", _describe_dataset)
    if start is None:
        return Licence(of_data, f"of the data, {_last(data)}", False, bool(pending), remarks)
    of_base = look("model", "model_name_or_path", _describe_model)
    if of_base and of_data and of_base["license"] != of_data["license"]:
        remarks.append(f"the base model is under {of_base['license']}, the data are under {of_data['license']}")
    return Licence(of_base, f"of the base model, {_last(start)}", False, bool(pending), remarks)


def licence_of_folder(folder: Path, *, ask_hub: bool, chain: int = _LONGEST_CHAIN) -> dict[str, Any]:
    """The licence that a folder's card, configuration or run record names; of a run that of what it started from.

    Args:
        folder: of a checkpoint or of data.
        ask_hub: as in :func:`find_licence`.
        chain: as in :func:`find_licence`.

    Returns:
        The keys of a card's front matter that name it; empty where none is known.
    """
    readers: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
        ("README.md", lambda text: _known(front_matter_of(text))),
        ("config.json", lambda text: _known(json.loads(text))),
    ]
    if chain > 0:
        readers.append(
            (FILE_NAME, lambda text: find_licence(json.loads(text), None, ask_hub=ask_hub, chain=chain).keys)
        )
    for name, read in readers:
        try:
            if found := read((folder / name).read_text(encoding="utf-8")):
                return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # what is not there or cannot be read names no licence
    return {}


def _describe_model(name: str) -> dict[str, Any]:
    api = connect()
    info = patiently(f"look at {name}", lambda: api.model_info(name))
    return {} if info.card_data is None else dict(info.card_data.to_dict())


def _describe_dataset(name: str) -> dict[str, Any]:
    api = connect()
    info = patiently(f"look at the data set {name}", lambda: api.dataset_info(name))
    return {} if info.card_data is None else dict(info.card_data.to_dict())


def _known(card: Any) -> dict[str, Any]:
    """The licence keys of a card or configuration; empty where they name none."""
    if not isinstance(card, dict) or card.get("license") in (None, "", [], "unknown", ["unknown"]):
        return {}
    return {key: card[key] for key in _KEYS if card.get(key)}


def _last(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2]
