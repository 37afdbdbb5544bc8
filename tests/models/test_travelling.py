"""A saved folder is a model for everyone: in processes where the package cannot be imported, and where it is."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_imgproc_attn.models.image_processing_imgproc_segmentation import ImgProcSegmentationImageProcessor
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2ForTokenClassification,
    ImgProcGPT2LMHeadModel,
    ImgProcGPT2Model,
)
from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTBackbone,
    ImgProcViTForImageClassification,
    ImgProcViTForMaskedImageModeling,
    ImgProcViTForSemanticSegmentation,
    ImgProcViTModel,
)
from tests.helpers import ROOT, prepared_python, run_command
from tests.models.helpers import sharpen_
from tests.models.variants import PRESETS_OF, gpt2_config, made_once, token_ids, vit_config

GPT2_AUTO_MAP = {
    "AutoConfig": "configuration_imgproc_gpt2.ImgProcGPT2Config",
    "AutoModel": "modeling_imgproc_gpt2.ImgProcGPT2Model",
    "AutoModelForCausalLM": "modeling_imgproc_gpt2.ImgProcGPT2LMHeadModel",
    "AutoModelForSequenceClassification": "modeling_imgproc_gpt2.ImgProcGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_imgproc_gpt2.ImgProcGPT2ForTokenClassification",
}
VIT_AUTO_MAP = {
    "AutoConfig": "configuration_imgproc_vit.ImgProcViTConfig",
    "AutoModel": "modeling_imgproc_vit.ImgProcViTModel",
    "AutoModelForImageClassification": "modeling_imgproc_vit.ImgProcViTForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_imgproc_vit.ImgProcViTForMaskedImageModeling",
    "AutoModelForSemanticSegmentation": "modeling_imgproc_vit.ImgProcViTForSemanticSegmentation",
    "AutoBackbone": "modeling_imgproc_vit.ImgProcViTBackbone",
}
GPT2_CLASSES = {
    "base": ImgProcGPT2Model,
    "lm": ImgProcGPT2LMHeadModel,
    "sequence": ImgProcGPT2ForSequenceClassification,
    "token": ImgProcGPT2ForTokenClassification,
}
VIT_CLASSES = {
    "base": ImgProcViTModel,
    "classifier": ImgProcViTForImageClassification,
    "masked": ImgProcViTForMaskedImageModeling,
    "segmenter": ImgProcViTForSemanticSegmentation,
    "backbone": ImgProcViTBackbone,
}
SQUARE = {"image_size": 12, "num_channels": 3, "id2label": {0: "cat", 1: "dog", 2: "eel"}}

# Every class and preset, and a model in which every layer differs, the bare ones in several files.
CASES = [f"gpt2_{name}_{preset}" for name in GPT2_CLASSES for preset in PRESETS_OF["gpt2"]]
CASES += [f"vit_{name}_{preset}" for name in ("base", "classifier", "masked") for preset in PRESETS_OF["vit"]]
CASES += ["gpt2_base_mixed", "gpt2_lm_mixed", "vit_base_mixed", "vit_classifier_mixed"]
# A head on patches adds nothing that depends on the preset.
CASES += ["vit_segmenter_bilateral", "vit_segmenter_mixed", "vit_backbone_twicing"]


def some_cases() -> list[str]:
    """Every class, every preset of one backbone alone, and half of the others, each on one backbone; classes in turns.

    Each preset is saved and loaded in `tests/test_conversion.py`; the code that travels is that of all of them.
    """
    taken = [name for name in CASES if name.endswith("_mixed") or name.startswith(("vit_segmenter", "vit_backbone"))]
    for backbone, classes, start in (("gpt2", tuple(GPT2_CLASSES), 0), ("vit", tuple(VIT_CLASSES)[:3], 2)):
        other = PRESETS_OF["vit" if backbone == "gpt2" else "gpt2"]
        presets = PRESETS_OF[backbone]
        chosen = [name for place, name in enumerate(presets) if place % 4 == start or name not in other]
        for index, preset in enumerate(chosen):
            taken.append(f"{backbone}_{classes[index % len(classes)]}_{preset}")
    return taken


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All cases with ``--full``."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES if metafunc.config.getoption("--full") else some_cases())


def build(case: str) -> Any:
    """A sharpened model of a case in evaluation mode."""
    backbone, name, variant = case.split("_", 2)
    if backbone == "gpt2":
        return sharpen_(GPT2_CLASSES[name](gpt2_config(variant, pad_token_id=0, num_labels=3))).eval()
    return sharpen_(VIT_CLASSES[name](vit_config(variant, **SQUARE))).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: `w7` is 7."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w60", unk_token="w0")


def save(case: str, folder: Path) -> None:
    """The model, what processes its inputs, and what it computes here."""
    model = build(case)
    expected: dict[str, Any] = {"class": type(model).__name__}
    if case.startswith("gpt2"):
        expected["inputs"] = {"input_ids": token_ids()}
    else:
        save_picture(folder)
        kind = ImgProcSegmentationImageProcessor if "_segmenter_" in case else ViTImageProcessorPil
        processor = kind(size={"height": 12, "width": 12}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
        processor.save_pretrained(folder)
        expected["inputs"] = dict(processor(Image.open(folder / "picture.png"), return_tensors="pt"))
    model.save_pretrained(folder, **({"max_shard_size": "6KB"} if case.endswith("base_mixed") else {}))
    with torch.no_grad():
        output = model(**expected["inputs"])
        expected["hidden"] = first_of(model.base_model(**expected["inputs"]))
        expected["output"] = first_of(output)
        if "_segmenter_" in case:
            found = processor.post_process_semantic_segmentation(output, target_sizes=[(16, 10)])
            expected["labels"] = found[0].tolist()
        if "_lm_" in case:
            words = tokenizer()
            words.save_pretrained(folder)
            expected["generated"] = model.generate(**expected["inputs"], max_new_tokens=6, do_sample=False)
            prompt = words("w3 w17 w5", return_tensors="pt")
            answer = model.generate(prompt.input_ids, max_new_tokens=5, do_sample=False, use_cache=False)
            expected["text"] = words.decode(answer[0], skip_special_tokens=True)  # as the pipeline does
        if "_classifier_" in case:
            probabilities = output.logits[0].softmax(-1).tolist()
            expected["probabilities"] = {model.config.id2label[label]: p for label, p in enumerate(probabilities)}
    torch.save(expected, folder / "expected.pt")


def first_of(output: Any) -> torch.Tensor:
    """What a model computes, whatever its head."""
    names = ("logits", "reconstruction", "last_hidden_state", "feature_maps")
    found = output[next(name for name in names if name in output)]
    return found[-1] if isinstance(found, tuple) else found


def save_picture(folder: Path) -> None:
    """Random colours."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")


# The checkpoints are made once: a second worker would wait for the first.
pytestmark = pytest.mark.xdist_group("travelling")


def run(folder: Path, mode: str) -> None:
    """Run the worker, which writes its report to the folder."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / f"modules_{mode}"),
        **({"PYTHONPATH": str(ROOT)} if mode == "package" else {}),
    }
    elsewhere = folder / f"elsewhere_{mode}"
    elsewhere.mkdir()
    result = run_command(
        [prepared_python(), "-P", str(Path(__file__).with_name("travelling_worker.py")), str(folder), mode],
        cwd=elsewhere,
        env=environment,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def travelled(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Path, dict[str, dict[str, str]]]:
    """The checkpoints, and what two processes say of them: one without the package, then one with it."""
    cases = CASES if pytestconfig.getoption("--full") else some_cases()
    folder = made_once(tmp_path_factory, "travelling", partial(travel, cases))
    modes = ("remote", "package")
    return folder, {mode: json.loads((folder / f"report_{mode}.json").read_text()) for mode in modes}


def travel(cases: list[str], folder: Path) -> None:
    """Save every case and send it round."""
    for case in cases:
        save(case, folder / "saved" / case)
    for mode in ("remote", "package"):
        run(folder, mode)


def test_every_auto_class_is_listed_and_every_file_is_there(case: str, travelled: Any) -> None:
    folder = travelled[0] / "saved" / case
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == (GPT2_AUTO_MAP if case.startswith("gpt2") else VIT_AUTO_MAP)
    for reference in auto_map.values():
        assert (folder / f"{reference.split('.')[0]}.py").is_file()


@pytest.mark.parametrize("mode", ["remote", "package"])
def test_checkpoints_load_in_other_processes(case: str, mode: str, travelled: Any) -> None:
    """Through every Auto class, with their processors, pipelines, configurations alone, tuned and saved again."""
    report = {name: text for name, text in travelled[1][mode].items() if name.split()[0] == case}
    failed = {name: text for name, text in report.items() if text != "ok"}
    assert not failed, "\n".join(f"{name}:\n{text}" for name, text in failed.items())
    auto_classes = set(GPT2_AUTO_MAP if case.startswith("gpt2") else VIT_AUTO_MAP)
    checks = {"config", "processors", "tune" if mode == "remote" else "tuned"}
    checks |= {"pipeline"} if any(f"_{name}_" in case for name in ("lm", "classifier", "segmenter")) else set()
    if case.split("_")[1] in ("base", "masked"):
        auto_classes -= {"AutoModelForSemanticSegmentation", "AutoBackbone"}  # asked of the others
    assert {name.split()[1] for name in report} >= auto_classes | checks


def test_the_package_was_absent_and_nothing_ran_unasked(travelled: Any) -> None:
    report = travelled[1]["remote"]
    assert report["package"] == "absent"
    assert report["trust"] == "ok"


def test_tuned_folders_travel_on(case: str, travelled: Any) -> None:
    """What a process without the package saved has all files and Auto classes again."""
    folder, original = travelled[0] / "tuned" / case, travelled[0] / "saved" / case
    texts = [json.loads((path / "config.json").read_text()) for path in (folder, original)]
    assert texts[0]["auto_map"] == texts[1]["auto_map"]
    code = {path.name for path in original.glob("*.py")} - {path.name for path in original.glob("image_processing_*")}
    assert {path.name for path in folder.glob("*.py")} == code
    for path in folder.glob("*.py"):
        assert path.read_text() == (original / path.name).read_text()


def test_sharded_checkpoints_are_among_them(travelled: Any) -> None:
    for case in ("gpt2_base_mixed", "vit_base_mixed"):
        assert len(list((travelled[0] / "saved" / case).glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["gpt2_lm_mixed", "vit_classifier_bilateral"])
def test_saving_twice_writes_the_same(name: str, tmp_path: Path) -> None:
    """Saving leaves the model's own configuration as it was, but for the list of classes."""
    model = build(name)
    model.save_pretrained(tmp_path / "first")
    type(model).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
