"""Importing the package is cheap and makes the Auto classes know the model types, whatever is imported first."""

from __future__ import annotations

import subprocess

import pytest

import hf_imgproc_attn
from tests.helpers import RunPython

CHECK = """
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedImageModeling,
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
)
import hf_imgproc_attn as ours

gpt2, vit = AutoConfig.for_model("imgproc_gpt2", **SMALL_GPT2), AutoConfig.for_model("imgproc_vit", **SMALL_VIT)
assert type(gpt2) is ours.ImgProcGPT2Config and type(vit) is ours.ImgProcViTConfig
for auto_class, config, model_class in (
    (AutoModel, gpt2, ours.ImgProcGPT2Model),
    (AutoModelForCausalLM, gpt2, ours.ImgProcGPT2LMHeadModel),
    (AutoModelForSequenceClassification, gpt2, ours.ImgProcGPT2ForSequenceClassification),
    (AutoModelForTokenClassification, gpt2, ours.ImgProcGPT2ForTokenClassification),
    (AutoModel, vit, ours.ImgProcViTModel),
    (AutoModelForImageClassification, vit, ours.ImgProcViTForImageClassification),
    (AutoModelForMaskedImageModeling, vit, ours.ImgProcViTForMaskedImageModeling),
):
    assert type(auto_class.from_config(config)) is model_class, auto_class
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
assert TOKENIZER_MAPPING[ours.ImgProcGPT2Config].__name__ == "GPT2Tokenizer"
assert IMAGE_PROCESSOR_MAPPING[ours.ImgProcViTConfig]["pil"].__name__ == "ViTImageProcessorPil"

import sys
assert not [finder for finder in sys.meta_path if "hf_imgproc_attn" in type(finder).__module__]
print("registered")
"""
SMALL = """
SMALL_GPT2 = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bos_token_id=9, eos_token_id=9)
SMALL_VIT = dict(
    num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, image_size=8, patch_size=4
)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import transformers, hf_imgproc_attn",
        "import hf_imgproc_attn, transformers",
        "import hf_imgproc_attn, transformers.models.auto.modeling_auto",
        "from hf_imgproc_attn import ImgProcGPT2Config",
        pytest.param("from hf_imgproc_attn import PRESETS\nimport transformers", marks=pytest.mark.full),
        "import hf_imgproc_attn.models.modeling_imgproc_gpt2",
        pytest.param("import hf_imgproc_attn.models.modeling_imgproc_vit", marks=pytest.mark.full),
        "import hf_imgproc_attn.models.layer_filter",
        pytest.param("from hf_imgproc_attn import convert", marks=pytest.mark.full),
        "from hf_imgproc_attn.registration import register\nregister()\nregister()",
    ],
)
def test_registered_in_every_import_order(run_python: RunPython, first: str) -> None:
    """Those that ``--full`` alone tests start as another one does: by a name of the package, or in its models."""
    result = run_python("-c", first + "\n" + SMALL + CHECK)
    assert result.stdout == "registered\n", result.stderr
    assert result.stderr == "", "registration asks for nothing that is missing"


def test_two_threads_import_at_once(run_python: RunPython) -> None:
    threads = """
import threading
import hf_imgproc_attn
barrier = threading.Barrier(2)
errors = []
def start(name):
    barrier.wait()
    try:
        __import__(name)
    except BaseException as error:
        errors.append(error)
names = ("transformers", "transformers.models.auto.modeling_auto")
workers = [threading.Thread(target=start, args=(name,)) for name in names]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
assert not errors, errors
"""
    result = run_python("-c", threads + SMALL + CHECK)
    assert result.stdout.splitlines()[-1:] == ["registered"], result.stderr


def test_import_and_presets_need_neither_torch_nor_transformers(run_python: RunPython) -> None:
    result = run_python(
        "-c",
        "import sys, hf_imgproc_attn\n"
        "assert 'bilateral_twicing' in hf_imgproc_attn.PRESETS\n"
        "dir(hf_imgproc_attn)\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'numpy') if name in sys.modules])",
        fresh=True,
    )
    assert result.stdout == "[]\n", result.stderr


def test_every_public_name_exists() -> None:
    for name in hf_imgproc_attn.__all__:
        assert getattr(hf_imgproc_attn, name) is not None
    assert set(hf_imgproc_attn.__all__) <= set(dir(hf_imgproc_attn))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ImgProcBert'"):
        hf_imgproc_attn.ImgProcBert  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "from hf_imgproc_attn.conversion import ConversionReport",
        "import hf_imgproc_attn; hf_imgproc_attn.convert; import hf_imgproc_attn.conversion",
        "import importlib; importlib.import_module('hf_imgproc_attn.conversion')",
    ],
)
def test_convert_is_the_function_after_its_module_was_imported(run_python: RunPython, imports: str) -> None:
    result = run_python(
        "-c",
        f"{imports}\nimport inspect, hf_imgproc_attn\nfrom hf_imgproc_attn import convert\n"
        "print(inspect.isfunction(convert), convert is hf_imgproc_attn.convert)",
    )
    assert result.stdout == "True True\n", result.stderr


def test_failed_import_of_transformers_is_not_hidden_and_can_be_repeated(run_python: RunPython) -> None:
    """The hook neither swallows an error nor registers after it; the next successful import registers."""
    broken = """
import sys
import hf_imgproc_attn
sys.modules["hf_imgproc_attn.models.modeling_imgproc_vit"] = None  # importing it fails
try:
    import transformers
except ImportError:
    print("failed")
del sys.modules["hf_imgproc_attn.models.modeling_imgproc_vit"]
import transformers
"""
    result = run_python("-c", broken + SMALL + CHECK)
    assert result.stdout.splitlines() == ["failed", "registered"], result.stderr


def test_pipelines_accept_the_models_without_complaint(run_python: RunPython) -> None:
    """`pipeline` logs an error for a class that is missing in the tables of names."""
    code = """
import numpy, torch
from PIL import Image
from transformers import AutoTokenizer, GPT2Tokenizer, ViTImageProcessorPil, pipeline
import hf_imgproc_attn as ours

lm = ours.ImgProcGPT2LMHeadModel(ours.ImgProcGPT2Config(**SMALL_GPT2))
letters = {letter: index for index, letter in enumerate("abcdefghi")} | {"<|endoftext|>": 9, "j": 10}
tokenizer = GPT2Tokenizer(vocab=letters, merges=[])
lm.save_pretrained("lm")
tokenizer.save_pretrained("lm")
text = pipeline("text-generation", model="lm")("abc", max_new_tokens=2, do_sample=False)
assert text[0]["generated_text"].startswith("abc")

vit = ours.ImgProcViTForImageClassification(ours.ImgProcViTConfig(**SMALL_VIT, num_labels=3))
vit.save_pretrained("vit")
ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained("vit")
image = Image.fromarray(numpy.zeros((8, 8, 3), dtype=numpy.uint8))
assert len(pipeline("image-classification", model="vit")(image)) == 3
print("done")
"""
    result: subprocess.CompletedProcess[str] = run_python("-c", SMALL + code)
    assert result.stdout.splitlines()[-1:] == ["done"], result.stderr
    assert "is not supported for" not in result.stderr
