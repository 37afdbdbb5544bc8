"""A process of `test_travelling.py`: loads every checkpoint of a folder, with or without the package, and reports.

Usage: travelling_worker.py FOLDER remote|package
"""

from __future__ import annotations

import importlib.abc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]
PACKAGE = "hf_imgproc_attn"


class Blocker(importlib.abc.MetaPathFinder):
    """Makes the package impossible to import, installed or not."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name.split(".")[0] == PACKAGE:
            raise ImportError(f"{PACKAGE} is blocked in this process")


if MODE == "remote":
    sys.meta_path.insert(0, Blocker())
else:
    __import__(PACKAGE)

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, pipeline  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

TRUST = {"trust_remote_code": True} if MODE == "remote" else {}
REPORT: dict[str, str] = {}


def check(name: str, function: Callable[[], Any]) -> Any:
    """Run one check and report how it ended."""
    try:
        result = function()
    except Exception:
        REPORT[name] = traceback.format_exc(limit=-6)
        return None
    REPORT[name] = "ok"
    return result


def auto(name: str) -> Any:
    """An Auto class by its name."""
    return getattr(transformers, name)


def from_folder(auto_class: str, folder: Path, **options: Any) -> Any:
    """Through an Auto class; ``AutoBackbone.from_pretrained`` of Transformers 5.23 itself takes Hub names only."""
    kind = auto(auto_class)
    if auto_class != "AutoBackbone":
        return kind.from_pretrained(folder, **options)
    return super(kind.__mro__[1], kind).from_pretrained(folder, **options)


def first_of(output: Any) -> torch.Tensor:
    """What a model computes, whatever its head."""
    names = ("logits", "reconstruction", "last_hidden_state", "feature_maps")
    found = output[next(name for name in names if name in output)]
    return found[-1] if isinstance(found, tuple) else found


def compare(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the alignment of memory-mapped weights."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def base_output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of the backbone."""
    return first_of(model.base_model(**inputs))


@torch.no_grad()
def load(folder: Path, auto_class: str) -> None:
    """Through one Auto class: the head's output where it was saved, else the backbone's."""
    expected = torch.load(folder / "expected.pt")
    model = from_folder(auto_class, folder, **TRUST).eval()
    home = type(model).__module__
    assert home.startswith("transformers_modules." if MODE == "remote" else f"{PACKAGE}.models."), home
    assert type(model.config).__name__ in ("ImgProcGPT2Config", "ImgProcViTConfig")
    if (auto_class == "AutoBackbone") == (expected["class"] == "ImgProcViTBackbone"):
        compare(base_output(model, expected["inputs"]), expected["hidden"])
    if type(model).__name__ == expected["class"]:
        compare(first_of(model(**expected["inputs"])), expected["output"])
    if "generated" in expected and auto_class == "AutoModelForCausalLM":
        generate(model, expected)


def generate(model: Any, expected: dict[str, Any]) -> None:
    """Greedy decoding with a cache: the tokens that were generated where the model was saved."""
    got = model.generate(**expected["inputs"], max_new_tokens=6, do_sample=False)
    assert got.tolist() == expected["generated"].tolist()


def from_config(folder: Path, auto_class: str) -> None:
    """A fresh model of a configuration that was saved alone."""
    config = AutoConfig.from_pretrained(folder, **TRUST)
    alone = FOLDER / f"config_{MODE}_{folder.name}"
    config.save_pretrained(alone)
    again = AutoConfig.from_pretrained(folder, **TRUST)
    assert again.to_dict() == config.to_dict()
    assert type(again).__module__ == type(config).__module__
    model = auto(auto_class).from_config(config, **TRUST)
    saved = torch.load(folder / "expected.pt")["class"]
    if type(model).__name__ == saved:
        stored = [load_file(path) for path in folder.glob("*.safetensors")]
        assert sum(value.numel() for part in stored for value in part.values()) == model.num_parameters()


def text_pipeline(folder: Path) -> None:
    """Generates the text that was generated where the model was saved."""
    expected = torch.load(folder / "expected.pt")
    generator = pipeline("text-generation", model=str(folder), device="cpu", **TRUST)
    [answer] = generator("w3 w17 w5", max_new_tokens=5, do_sample=False)
    # The pipeline joins the prompt and what it decodes apart from it.
    words = ["w" + number for number in answer["generated_text"].replace(" ", "").split("w")[1:]]
    assert words == expected["text"].split(), (answer, expected["text"])


def image_pipeline(folder: Path) -> None:
    """Gives the probabilities that were computed where the model was saved."""
    expected = torch.load(folder / "expected.pt")
    classifier = pipeline("image-classification", model=str(folder), device="cpu", **TRUST)
    answer = {item["label"]: item["score"] for item in classifier(Image.open(folder / "picture.png"))}
    assert answer.keys() == expected["probabilities"].keys()
    for label, probability in expected["probabilities"].items():
        assert abs(answer[label] - probability) < 1e-4, (answer, expected["probabilities"])


def segmentation_pipeline(folder: Path) -> None:
    """Gives every pixel the class that it was given where the model was saved."""
    expected = torch.load(folder / "expected.pt")
    segment = pipeline("image-segmentation", model=str(folder), device="cpu", **TRUST)
    names = segment.model.config.id2label
    parts = {part["label"]: part["mask"] for part in segment(Image.open(folder / "picture.png"))}
    wanted = {names[label] for row in expected["labels"] for label in row}
    assert parts.keys() == wanted, (parts, wanted)
    pixels = [(x, y) for y in range(16) for x in range(10)]
    agreed = [parts[names[expected["labels"][y][x]]].getpixel((x, y)) > 0 for x, y in pixels]
    assert sum(agreed) >= 158, "all but a few ties"


def processors(folder: Path) -> None:
    """Tokenizer or image processor, from the same folder."""
    expected = torch.load(folder / "expected.pt")
    if "text" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
        assert tokenizer("w3 w17 w5").input_ids == [3, 17, 5]
    if "probabilities" in expected:
        processor = AutoImageProcessor.from_pretrained(folder, **TRUST)
        pixels = processor(Image.open(folder / "picture.png"), return_tensors="pt").pixel_values
        compare(pixels, expected["inputs"]["pixel_values"])


def tune(folder: Path, auto_class: str) -> None:
    """Load, train a step, save, load again; the saved folder is for another process too."""
    expected = torch.load(folder / "expected.pt")
    model = from_folder(auto_class, folder, **TRUST)
    before = base_output(model.eval(), expected["inputs"]).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    base_output(model.train(), expected["inputs"]).square().mean().backward()
    optimizer.step()
    target = FOLDER / "tuned" / folder.name
    model.eval().save_pretrained(target)
    with torch.no_grad():
        hidden = base_output(model, expected["inputs"])
        output = first_of(model(**expected["inputs"]))
    assert (hidden - before).abs().max() > 1e-3
    tuned = {"inputs": expected["inputs"], "class": expected["class"], "hidden": hidden, "output": output}
    torch.save(tuned, target / "expected.pt")
    load(target, auto_class)


def head_and_back(folder: Path, auto_class: str) -> None:
    """The backbone of a checkpoint with a head, saved alone, grows a new head."""
    expected = torch.load(folder / "expected.pt")
    backbone = auto("AutoModel").from_pretrained(folder, **TRUST).eval()
    target = FOLDER / f"backbone_{MODE}" / folder.name
    backbone.save_pretrained(target)
    again = auto(auto_class).from_pretrained(target, **TRUST, num_labels=7).eval()
    assert again.num_labels == 7
    with torch.no_grad():
        compare(base_output(again, expected["inputs"]), expected["hidden"])
        assert all(value.isfinite().all() for value in again.state_dict().values())


def refuses_without_trust(folder: Path) -> None:
    """Where the package is absent, nothing of the folder runs unasked."""
    for load_it in (AutoConfig.from_pretrained, auto("AutoModel").from_pretrained):
        message = "loaded"
        try:
            load_it(folder, trust_remote_code=False)
        except ValueError as error:
            message = str(error)
        assert "trust_remote_code" in message, message


def main() -> None:
    """Every folder, every Auto class."""
    folders = sorted(path.parent for path in FOLDER.glob("saved/*/expected.pt"))
    for folder in folders:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        saved = torch.load(folder / "expected.pt")["class"]
        own = next(name for name, reference in auto_map.items() if reference.endswith(f".{saved}"))
        check(f"{folder.name} AutoConfig", lambda folder=folder: AutoConfig.from_pretrained(folder, **TRUST))
        for name in auto_map:
            if name in ("AutoModelForSemanticSegmentation", "AutoBackbone") and (
                "_base_" in folder.name or "_masked_" in folder.name
            ):
                continue
            if name != "AutoConfig":
                check(f"{folder.name} {name}", lambda folder=folder, name=name: load(folder, name))
        check(f"{folder.name} config", lambda folder=folder, own=own: from_config(folder, own))
        check(f"{folder.name} processors", lambda folder=folder: processors(folder))
        if "CausalLM" in own:
            check(f"{folder.name} pipeline", lambda folder=folder: text_pipeline(folder))
        if "ImageClassification" in own:
            check(f"{folder.name} pipeline", lambda folder=folder: image_pipeline(folder))
        if "Segmentation" in own:
            check(f"{folder.name} pipeline", lambda folder=folder: segmentation_pipeline(folder))
        if "Classification" in own or "Segmentation" in own:
            check(f"{folder.name} backbone", lambda folder=folder, own=own: head_and_back(folder, own))
        if MODE == "remote":
            check(f"{folder.name} tune", lambda folder=folder, own=own: tune(folder, own))
        else:
            check(f"{folder.name} tuned elsewhere", lambda f=FOLDER / "tuned" / folder.name, own=own: load(f, own))
    if MODE == "remote":
        check("trust", lambda: refuses_without_trust(folders[0]))
        REPORT["package"] = "imported" if PACKAGE in sys.modules else "absent"
    (FOLDER / f"report_{MODE}.json").write_text(json.dumps(REPORT, indent=1))


if __name__ == "__main__":
    main()
