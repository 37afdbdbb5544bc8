"""The app: what it answers, what it refuses, and that it works in a browser."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.lens.app_look import KEPT_FOLDERS, Question, answer, save, usable_presets
from tests.helpers import ROOT, started
from tests.lens.browser import Tab, use

TOKENS = "[[3, 4, 5, 6, 7, 8, 9]]"


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take most of the time and have tests of their own."""
    monkeypatch.setattr("hf_imgproc_attn.lens.app_look.draw_all", lambda reports: {})


@pytest.mark.usefixtures("_undrawn")
def test_preset_is_shown_beside_the_checkpoint_as_it_is(checkpoints: Path) -> None:
    question = Question(str(checkpoints / "llama"), "twicing", text=TOKENS, beside=2, token=5, name="Stories")
    found = answer(question)
    assert [report.model for report in found.reports] == ["Stories", "Stories with twicing"]
    plain, boosted = (report.layers[1] for report in found.reports)
    assert (found.reports[0].samples, found.reports[0].length, found.reports[0].token) == (3, 7, 5)
    assert found.reports[0].data == "the given text, and beside it 2 samples of texts that the model itself wrote"
    assert found.reports[0].labels == ["3", "4", "5", "6", "7", "8", "9"]
    assert plain.heads[0].operator_spectrum == plain.heads[0].filter_spectrum
    assert boosted.heads[0].operator_spectrum != boosted.heads[0].filter_spectrum
    assert set(plain.maps) == {"content", "position", "product"}
    assert "| | Stories | Stories with twicing |" in found.summary
    assert "<h1>What Stories, Stories with twicing filters</h1>" in found.page
    # The checkpoint that is kept in memory has no filter in it.
    again = answer(Question(str(checkpoints / "llama"), text=TOKENS, beside=0, spectra=False, noise=0.0))
    assert again.reports[0].layers[1].kind == "stock attention"
    assert "Not measured: kernel decomposition by mean effects, and maps of position and content" in again.summary


@pytest.mark.usefixtures("_undrawn")
def test_clicked_place_of_an_image_is_its_patch(checkpoints: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    question = Question(
        str(checkpoints / "vit"), image=str(tmp_path / "red.png"), place=(0.99, 0.3), beside=1, spectra=False
    )
    (report,) = answer(question).reports
    assert report.grid is not None
    rows, columns = report.grid
    assert report.token == report.special + int(0.3 * rows) * columns + columns - 1
    assert report.data == "the given image, and beside it 1 sample of handwritten digits"


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("", {}, "choose a checkpoint"),
        ("./nowhere", {}, "'./nowhere', which does not exist"),
        ("llama", {"preset": "blur"}, "preset must be one of as it is, "),
        ("llama", {"text": "Some words."}, "texts need a tokenizer"),
        ("llama", {"text": "[[3, 50]]"}, "token numbers must be from 0 to 49"),
        ("llama", {"text": "[[3]]"}, "at least 2 tokens, got 1"),
        ("llama", {"image": "red.png"}, "takes texts, got an image"),
        ("llama", {"text": TOKENS, "image": "red.png"}, "give a text or an image, not both"),
        ("llama", {"beside": 32}, "samples beside it must be an integer from 0 to 31, got 32"),
        ("llama", {"text": TOKENS, "token": 7, "beside": 0}, "token must be below the number of tokens, 7, got 7"),
        ("vit", {"text": "Some words."}, "takes images, got a text"),
        ("vit", {"place": (0.5, 1.5)}, "place must be two shares of width and height from 0 to 1"),
        ("gpt2", {"preset": "twicing", "text": TOKENS}, "twicing cannot be put into"),
        ("t5", {"text": TOKENS}, "choose stack among encoder.block, decoder.block"),
    ],
)
def test_what_cannot_be_answered_is_said(model: str, fields: dict[str, Any], message: str, checkpoints: Path) -> None:
    name = str(checkpoints / model) if model.isalnum() else model
    with pytest.raises(ValueError, match=r"\w") as error:
        answer(Question(name, **fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beside", None, "samples beside it must be an integer from 0 to 31, got nothing"),
        ("beside", "", "samples beside it must be an integer from 0 to 31, got nothing"),
        ("beside", 2.5, "samples beside it must be an integer from 0 to 31, got 2.5"),
        ("noise", None, "noise must be a number from 0 to 1, got nothing"),
        ("token", "-1", "token must be an integer >= 0 or empty, got -1"),
    ],
)
def test_emptied_fields_of_the_app_are_named(field: str, value: Any, message: str, checkpoints: Path) -> None:
    import gradio

    from hf_imgproc_attn.lens.app import _look

    held = {"beside": 3, "token": "", "noise": 0.1, field: value}
    name = str(checkpoints / "llama")
    given = [name, "as it is", "", None, held["beside"], held["token"], None, held["noise"], False]
    with pytest.raises(gradio.Error, match=message):
        _look(given, {}, True)


def test_offered_presets_can_be_put_into_a_model() -> None:
    assert {"twicing", "bilateral_gaussian", "neutreno"} <= set(usable_presets())
    assert not {"softmax", "bilateral", "gradient_boosted"} & set(usable_presets())


@pytest.mark.usefixtures("_undrawn")
def test_old_downloads_are_removed(checkpoints: Path) -> None:
    found = answer(Question(str(checkpoints / "llama"), text=TOKENS, beside=0, spectra=False, noise=0.0))
    kept = [save(found) for _ in range(KEPT_FOLDERS + 1)]
    assert [Path(page).is_file() for page, _ in kept] == [False, *[True] * KEPT_FOLDERS]
    assert Path(kept[-1][1]).read_text(encoding="utf-8").startswith("[")


# --------------------------------------------------------------------------------------------------------------------
# The command and the Space
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "port must be an integer from 1 to 65535, got 0"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["./nowhere"], "MODEL must be a local path or a Hub name, got './nowhere', which does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["app", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_command_offers_the_models_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Any] = []
    stub = SimpleNamespace(serve=lambda *given: served.append(given))
    monkeypatch.setitem(sys.modules, "hf_imgproc_attn.lens.app", stub)
    monkeypatch.setattr("hf_imgproc_attn.errors.missing_packages", lambda extra: [])
    assert main(["app", "owner/name", "--port", "7861"]) == 0
    assert served == [({"owner/name": "owner/name"}, 7861)]
    folders = [str(tmp_path / name / "best") for name in ("one", "two")]
    for folder in folders:
        Path(folder).mkdir(parents=True)
    assert main(["app", *folders]) == 0
    assert served[1] == ({"one/best": folders[0], "two/best": folders[1]}, None)


def test_space_asks_for_what_the_app_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["lens"], *extras["app"]]
    digits = [line for line in extras["train"] if line.startswith("scikit-learn")]
    lines = (ROOT / "app" / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(lines) == sorted([*wanted, *digits])
    _, front, _ = (ROOT / "app" / "README.md").read_text(encoding="utf-8").split("---\n")
    matter = yaml.safe_load(front)
    assert (ROOT / "app" / matter["app_file"]).is_file()
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={matter['sdk_version']}" in pinned


@pytest.fixture(scope="module")
def space(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the Space, which offers two of the checkpoints, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {
        "LENS_MODELS": f"{checkpoints / 'llama'},{checkpoints / 'vit'}",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio")),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "app" / "app.py")]
    with started(command, env={**os.environ, **more}, cwd=tmp_path_factory.mktemp("cwd")) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        assert first == f"the app is at http://127.0.0.1:{port}/", process.communicate()[1][-3000:]
        yield first.rpartition(" ")[2]


def test_space_serves_a_page(space: str) -> None:
    with urllib.request.urlopen(space, timeout=60) as answered:
        assert "What does attention filter?" in answered.read().decode("utf-8")


WRITE = """(() => {
  const field = document.querySelector(%r);
  field.focus(); field.value = %r;
  for (const name of ['input', 'change', 'blur']) field.dispatchEvent(new Event(name, {bubbles: true}));
})()"""


def test_app_works_in_a_browser(space: str, tmp_path: Path) -> None:
    """A visitor types tokens, looks, and switches the panel; a mistake is said, and no folder may be named."""
    frame = "document.querySelector('#view iframe')?.contentDocument"  # there before what it shows is

    async def visit(tab: Tab) -> None:
        await tab.until("document.querySelector('#look') && document.querySelector('#checkpoint input')?.value")
        await tab.value(WRITE % ("textarea", TOKENS))
        await asyncio.sleep(1)  # the field tells its app a moment later
        await tab.value("document.querySelector('#look').click()")
        await tab.until(f"{frame}?.body?.dataset.ready")
        assert "7 tokens, the given text, and beside it 15 samples" in await tab.value(f"{frame}.body.innerText")
        assert "entropy / uniform" in await tab.value("document.querySelector('#summary').innerText")
        await tab.value(f"{frame}.querySelector('button[data-panel=maps]').click()")
        assert await tab.value(f"{frame}.querySelector('section.shown').id") == "maps"
        await tab.value(WRITE % ("#checkpoint input", "/etc"))
        await asyncio.sleep(1)
        await tab.value("document.querySelector('#look').click()")
        await tab.until("document.body.innerText.includes('checkpoint must be a Hub name')")

    assert use(space, tmp_path, visit) == []
