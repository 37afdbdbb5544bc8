"""The app: the lens in a browser, for a visitor who has no command line. ``imgproc-attn app`` and ``app/app.py``."""

from __future__ import annotations

import html
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before Gradio is imported, which otherwise reports to its makers that an app has started.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio
from PIL import Image as Pillow

from ..errors import UsageError, plain_message
from .app_look import AS_IT_IS, MOST_BESIDE, Question, answer, save, usable_presets

TITLE = "What does attention filter?"
INTRODUCTION = (
    "Self-attention averages the values of tokens with weights that depend on how alike they are: it is a filter, as "
    "image processing knows them. Choose a trained model, give it a text or an image, and see what its filters do. "
    "A preset puts another filter into the model's layers and shows both side by side."
)
WAITING = "Choose a checkpoint and press *Look*: here appear its numbers and its page."


def make_app(models: Mapping[str, str], *, paths: bool = True) -> gradio.Blocks:
    """The app.

    Args:
        models: name -> folder or Hub name of the checkpoints that are offered; a visitor may type others.
        paths: whether a visitor may name a folder of this machine; False where strangers visit.
    """
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gradio.Markdown(f"# {TITLE}\n\n{INTRODUCTION}")
        place = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                checkpoint = gradio.Dropdown(
                    list(models.items()),
                    value=next(iter(models.values()), None),
                    allow_custom_value=True,
                    label="Checkpoint",
                    info="a folder or a Hub name" if paths else "a Hub name",
                    elem_id="checkpoint",
                )
                preset = gradio.Dropdown([AS_IT_IS, *usable_presets()], value=AS_IT_IS, label="Preset")
                text = gradio.Textbox(
                    label="Text", lines=3, info="for a model of texts; without text and image it sees real data"
                )
                image = gradio.Image(
                    label="Image (click: whose maps are shown)",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=220,
                )
                where = gradio.Markdown("")
                beside, token, noise, spectra = _further()
                button = gradio.Button("Look", variant="primary", elem_id="look")
            with gradio.Column(scale=3, min_width=320):
                summary = gradio.Markdown(WAITING, elem_id="summary")
                view = gradio.HTML("", elem_id="view")
                files = gradio.File(label="Page and numbers", visible=False)
        image.select(_place_of, [image], [place, where], api_name=False)
        image.change(lambda: (None, ""), None, [place, where], api_name=False)

        def look(*given: Any) -> tuple[str, str, Any]:
            return _look(given, {folder: name for name, folder in models.items()}, paths)

        asked = [checkpoint, preset, text, image, beside, token, place, noise, spectra]
        # One look at a time: a model is watched through hooks, and shares the machine's cores.
        button.click(look, asked, [summary, view, files], concurrency_limit=1, api_name="look")
    return app


def _further() -> tuple[gradio.Slider, gradio.Textbox, gradio.Slider, gradio.Checkbox]:
    """The options that a visitor seldom needs."""
    with gradio.Accordion("More", open=False):
        beside = gradio.Slider(
            0,
            MOST_BESIDE,
            value=15,
            step=1,
            label="Samples beside it",
            info="real data behind your own: they let position and content be told apart",
        )
        token = gradio.Textbox(label="Token whose maps are shown", info="its number, from 0; empty: one in the middle")
        noise = gradio.Slider(0, 1, value=0.1, step=0.05, label="Noise", info="a share of the input's deviation")
        spectra = gradio.Checkbox(value=True, label="Spectra", info="eigenvalues take the most time")
    return beside, token, noise, spectra


def _place_of(image: str, event: gradio.SelectData) -> tuple[tuple[float, float], str]:
    """The place that was clicked, as shares of width and height, and a line that says so."""
    with Pillow.open(image) as picture:
        width, height = picture.size
    across, down = event.index
    place = (min(across / width, 1.0), min(down / height, 1.0))
    return place, f"The maps are those of the patch at {100 * place[0]:.0f} % across, {100 * place[1]:.0f} % down."


def _look(given: Sequence[Any], offered: Mapping[str, str], paths: bool) -> tuple[str, str, Any]:
    """What the button does; whatever is wrong with the question is said in the browser."""
    checkpoint, preset, text, image, beside, token, place, noise, spectra = given
    checkpoint = str(checkpoint or "").strip()
    try:
        if not paths and checkpoint not in offered and not is_hub_name(checkpoint):
            raise UsageError(f"checkpoint must be a Hub name, such as owner/name, got {checkpoint!r}")
        question = Question(
            checkpoint=checkpoint,
            preset=preset,
            text=text or "",
            image=image,
            beside=_number(beside, f"samples beside it must be an integer from 0 to {MOST_BESIDE}"),
            token=_number(token, "token must be an integer >= 0 or empty") if str(token or "").strip() else None,
            place=None if place is None else (float(place[0]), float(place[1])),
            noise=_share(noise),
            spectra=bool(spectra),
            name=offered.get(checkpoint, ""),
        )
        found = answer(question)
    except (UsageError, ValueError) as error:
        raise gradio.Error(plain_message(error), duration=None, print_exception=False) from error
    frame = (
        f'<iframe title="the page of the lens" srcdoc="{html.escape(found.page, quote=True)}" '
        'style="width:100%;height:80vh;border:1px solid #bbb;background:#fff"></iframe>'
    )
    return found.summary, frame, gradio.File(save(found), visible=True)


def _number(given: Any, rule: str) -> int:
    """An integer of a field, which a visitor may have emptied."""
    text = "" if given is None else str(given).strip().removesuffix(".0")
    if not text.isdecimal():
        raise UsageError(f"{rule}, got {text or 'nothing'}")
    return int(text)


def _share(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise UsageError(f"noise must be a number from 0 to 1, got {given or 'nothing'}")
    return float(given)


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one of the Hub: no folder of this machine has it."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def serve(models: Mapping[str, str], port: int | None = None, *, paths: bool = True) -> None:
    """Run the app until it is interrupted, on this machine only unless ``GRADIO_SERVER_NAME`` says otherwise.

    Args:
        models, paths: as of :func:`make_app`.
        port: None: ``GRADIO_SERVER_PORT``, or the first free one from 7860 on.

    Raises:
        UsageError: for a port that is not free.
    """
    try:
        _, address, _ = make_app(models, paths=paths).launch(
            server_port=port, quiet=True, prevent_thread_lock=True, share=False
        )
    except OSError as error:
        raise UsageError(f"port must be free, got {port}: {plain_message(error)}") from error
    print(f"the app is at {address}", flush=True)
    threading.Event().wait()
