"""The licence of a checkpoint is one that somebody chose, or none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.cards.rendering import load_results
from hf_imgproc_attn.hub.client import connect
from hf_imgproc_attn.hub.licences import find_licence
from tests.helpers import ROOT
from tests.hub.server import HubServer

NONE = "none was given, and none of a base model or of the data is known"


def record(*, base: Any = None, data: str = "digits", license: str | None = None) -> dict[str, Any]:  # noqa: A002
    made = copy.deepcopy(load_results(ROOT / "training" / "results" / "vit_digits_twicing.json").record)
    made["arguments"]["model"]["model_name_or_path"] = None if base is None else str(base)
    made["arguments"]["data"]["dataset_name"] = data
    if license is not None:
        made["arguments"]["run"] = {"license": license}
    return made


def folder(place: Path, **files: Any) -> Path:
    """A checkpoint's folder with a card of this front matter, a configuration, a run record."""
    place.mkdir()
    for name, content in files.items():
        text = json.dumps(content)
        (place / {"card": "README.md", "config": "config.json", "run": "run.json"}[name]).write_text(
            f"---\n{text}\n---\n# x\n" if name == "card" else text, encoding="utf-8"
        )
    return place


def test_nobody_chose_one() -> None:
    found = find_licence(record(), None, ask_hub=False)
    assert (found.keys, found.is_given, found.remarks, str(found)) == ({}, False, [], NONE)


def test_the_user_is_asked_first(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", card={"license": "mit"})
    found = find_licence(record(base=base, license="bsd"), "cc0-1.0", ask_hub=False)
    assert (found.keys, found.is_given, str(found)) == ({"license": "cc0-1.0"}, True, "cc0-1.0 (--license)")
    found = find_licence(record(base=base, license="bsd"), None, ask_hub=False)
    assert (found.is_given, str(found)) == (True, "bsd (--license of the training command)")


def test_a_base_model_in_a_folder(tmp_path: Path) -> None:
    card = {"license": "other", "license_name": "own", "license_link": "LICENSE", "tags": ["x"]}
    found = find_licence(record(base=folder(tmp_path / "a", card=card)), None, ask_hub=False)
    assert found.keys == {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert str(found) == "other (of the base model, a)"
    found = find_licence(record(base=folder(tmp_path / "b", card={}, config={"license": "mit"})), None, ask_hub=False)
    assert found.keys == {"license": "mit"}
    for name, content in (("c", {"card": {"license": "unknown"}}), ("d", {"config": {}}), ("e", {"card": [1]})):
        assert find_licence(record(base=folder(tmp_path / name, **content)), None, ask_hub=False).keys == {}
    assert find_licence(record(base=tmp_path / "gone"), None, ask_hub=False).keys == {}


def test_a_run_that_started_from_a_run_has_what_that_one_started_from(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", card={"license": "cc-by-nc-4.0"})
    second = folder(tmp_path / "second", config={}, run=record(base=first))
    third = folder(tmp_path / "third", run=record(base=second))
    assert find_licence(record(base=third), None, ask_hub=False).keys == {"license": "cc-by-nc-4.0"}
    (second / "run.json").write_text(json.dumps(record(base=third)), encoding="utf-8")  # round and round
    assert find_licence(record(base=third), None, ask_hub=False).keys == {}


def test_base_model_and_data_on_the_hub(hub: HubServer) -> None:
    api = connect(hub.url)
    for name, card in (("ann/base", b"---\nlicense: gpl-3.0\n---\n"), ("ann/bare", b"# nothing\n")):
        api.create_repo(name)
        with pytest.warns(UserWarning, match="empty or missing") if name == "ann/bare" else _nothing():
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
    hub.add_dataset("ann/birds", {"license": "cc-by-nc-4.0"})
    found = find_licence(record(base="ann/base"), None, ask_hub=True)
    assert str(found) == "gpl-3.0 (of the base model, base)"
    later = find_licence(record(base="ann/base"), None, ask_hub=False)
    assert (later.keys, later.is_pending) == ({}, True)
    assert later.remarks == ["the licence of ann/base is asked from the Hub when the run is published"]
    assert find_licence(record(base="ann/bare"), None, ask_hub=True).keys == {}
    found = find_licence(record(base="ann/none"), None, ask_hub=True)
    assert found.keys == {}
    assert "the licence of ann/none could not be asked: " in found.remarks[0]

    found = find_licence(record(data="ann/birds"), None, ask_hub=True)
    assert str(found) == "cc-by-nc-4.0 (of the data, birds)"
    # The weights come from the base model: where its licence is not known, that of the data is none for them.
    assert find_licence(record(base="ann/bare", data="ann/birds"), None, ask_hub=True).keys == {}
    found = find_licence(record(base="ann/base", data="ann/birds"), None, ask_hub=True)
    assert found.keys == {"license": "gpl-3.0"}
    assert found.remarks == ["the base model is under gpl-3.0, the data are under cc-by-nc-4.0"]


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
