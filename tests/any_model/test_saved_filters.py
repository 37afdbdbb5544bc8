"""Filtered models are saved as what they are, and load with their filters in a process without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
)

from hf_imgproc_attn import apply_filter, filtered_layers, remove_filter
from hf_imgproc_attn.models.any_filter import filter_arguments
from hf_imgproc_attn.models.configuration_imgproc_filtered import ImgProcFilteredConfig
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.any_model.architectures import DECODERS, GROUPED, build, inputs, output
from tests.helpers import prepared_python, run_command

ELSEWHERE = """
import json, sys, torch, transformers
sys.modules["hf_imgproc_attn"] = None
folder, auto_class, stock, *others = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
assert type(model) is getattr(transformers, stock), type(model)
given = torch.load(f"{folder}/given.pt")
with torch.no_grad():
    result = model(**given)
result = result.logits if "logits" in result else result.last_hidden_state
wanted = torch.load(f"{folder}/wanted.pt")
assert torch.equal(result, wanted), (result - wanted).abs().max()
if "CausalLM" in auto_class:
    model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3, pad_token_id=0)
for other in others:
    found = getattr(transformers, other).from_pretrained(folder, trust_remote_code=True)
    numbers, wanted = (dict(each.base_model.named_parameters()) for each in (found, model))
    assert [name for name in numbers if "imgproc" in name] == [name for name in wanted if "imgproc" in name]
    assert all(torch.equal(value, wanted[name]) for name, value in numbers.items())
    if other == "AutoModel":
        assert torch.equal(found(**given)[0], model.base_model(**given)[0])
    print(type(found).__name__)
model.save_pretrained(f"{folder}/again")
print(json.load(open(f"{folder}/again/config.json"))["model_type"])
"""


def moved(name: str, **fields: Any) -> Any:
    """A filtered model whose scalars have been trained."""
    model = apply_filter(build(name), **fields)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "scalar_bias" in key:
                parameter.add_(0.3)
    return model


PLACES = {"first": 0, "last": 2}


def edit(folder: Path, **fields: Any) -> None:
    """Change ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "auto_class", "fields", "others"),
    [
        (
            "llama",
            "AutoModelForCausalLM",
            {"preset": "learned_twicing", "layers": [-1, 0]},
            {"AutoModel": "LlamaModel", "AutoModelForSequenceClassification": "LlamaForSequenceClassification"},
        ),
        (
            "dinov2",
            "AutoModel",
            {"preset": "alibi", "boosting": "learned"},
            {"AutoModelForImageClassification": "Dinov2ForImageClassification"},
        ),
        (
            "bart",
            "AutoModelForSeq2SeqLM",
            {"preset": "twicing", "stacks": "model.decoder.layers"},
            {"AutoModelForQuestionAnswering": "BartForQuestionAnswering"},
        ),
    ],
)
def test_a_process_without_the_package_loads_it(
    name: str, auto_class: str, fields: dict[str, Any], others: dict[str, str], tmp_path: Path
) -> None:
    """With the Auto class of the class that was saved, and with others that know the type, as of a stock model."""
    model, given = moved(name, **fields), inputs(name, padded=True)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save(output(model, given), tmp_path / "saved/wanted.pt")
    torch.save(given, tmp_path / "saved/given.pt")
    code = [prepared_python(), "-I", "-c", ELSEWHERE, str(tmp_path / "saved"), auto_class, type(model).__name__]
    code += others
    done = run_command(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*others.values(), "imgproc_filtered"]
    new = {line.split()[0] for line in done.stderr.splitlines() if "| MISSING" in line}
    assert all(key.startswith(("score.", "classifier.", "qa_outputs.")) for key in new)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_comes_back(name: str, tmp_path: Path) -> None:
    model, given = moved(name, preset="learned_twicing"), inputs(name, padded=True)
    model.save_pretrained(tmp_path)
    # Not saved, and the default has no float64.
    experts = {"experts_implementation": "eager"} if name == "gpt_oss" else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **experts)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert filtered_layers(loaded) == filtered_layers(model)
    found, wanted = output(loaded.eval(), given), output(model, given)
    # Gemma 3 makes a factor anew in the dtype of the weights, which these tests have converted from single.
    assert (found - wanted).abs().max() <= (1e-6 if name == "gemma3" else 0.0)
    assert loaded.config.model_type == model.config.model_type


def test_a_folder_says_what_it_is_and_is_refused_without_its_code(tmp_path: Path) -> None:
    moved("llama", preset="twicing", layers=[1]).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert said["model_type"] == "imgproc_filtered"
    assert said["filter_arguments"] == {"boosting": "twicing", "layers": [1]}
    assert said["base_model_type"] == "llama"
    assert said["auto_map"]["AutoModelForCausalLM"] == "modeling_imgproc_filtered.ImgProcFilteredForCausalLM"
    assert set(said["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        *(f"AutoModelFor{task}" for task in ("CausalLM", "QuestionAnswering")),
        *(f"AutoModelFor{task}Classification" for task in ("Sequence", "Token")),
    }
    code = "import sys; sys.modules['hf_imgproc_attn'] = None\nfrom transformers import AutoModelForCausalLM\n"
    code += f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)"
    done = run_command([prepared_python(), "-I", "-c", code], cwd=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_half_precision_and_options_of_the_stock_loader(tmp_path: Path) -> None:
    moved("llama", preset="learned_twicing").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    kinds = {key.rpartition(".")[2]: parameter.dtype for key, parameter in loaded.named_parameters()}
    assert kinds["weight"] == torch.bfloat16
    assert kinds["boosting_gain"] == torch.float32
    assert loaded.config._attn_implementation == "eager"


def test_half_precision_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    """Like a stock model, which Transformers loads in the precision of its file."""
    apply_filter(build("llama"), "learned_twicing").to(torch.bfloat16).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["base_config"]["dtype"] == saved["dtype"] == "bfloat16"
    edit(tmp_path, base_config={**saved["base_config"], "dtype": "float32"})  # as older versions wrote it
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        kinds = {key.rpartition(".")[2]: parameter.dtype for key, parameter in loaded.named_parameters()}
        assert (kinds["weight"], kinds["boosting_gain"]) == (torch.bfloat16, torch.float32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_from_config_makes_a_new_filtered_model(tmp_path: Path) -> None:
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model) is LlamaForCausalLM
    assert len(filtered_layers(model)) == 3


def test_a_model_without_its_filters_is_saved_as_stock(tmp_path: Path) -> None:
    model = remove_filter(moved("llama", preset="learned_twicing"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
    LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["base_config", "filter_arguments"])
@pytest.mark.parametrize("value", ["twicing", 7, []])
def test_a_configuration_whose_parts_are_no_dictionaries_is_refused(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"base_model_type": "llama", "base_config": {}, "filter_arguments": {}, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a dictionary or None, got "):
        ImgProcFilteredConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_type": ["llama"]}, r"base_model_type must be a model type, .* or None, got \['llama'\]"),
        ({"base_model_type": 7}, "base_model_type must be a model type, .* got 7"),
        ({"base_model_type": None}, "base_model_type must be a model type that Transformers knows, got None"),
        ({"base_model_type": "gpt17"}, "base_model_type must be a model type that Transformers knows, got 'gpt17'"),
        (
            {"base_model_type": "imgproc_filtered"},
            "base_model_type must be the type of a model without filters, got 'imgproc_filtered'",
        ),
        ({"base_config": {}}, "base_config must hold the configuration of the llama model, got {}"),
        ({"base_config": None}, "base_config must hold the configuration of the llama model, got {}"),
        ({"filter_arguments": {"model": "x"}}, "filter_arguments must be among preset, layers, .*, got 'model'"),
        ({"filter_arguments": {"boosted": "x"}}, "filter_arguments must be among preset, layers, .*, got 'boosted'"),
        ({"filter_arguments": None}, "nothing of the model would change"),
        (
            {"filter_arguments": {"boosting": "twicing", "stacks": 3}},
            "stacks must be one or more of model.layers, got 3",
        ),
        ({"filter_arguments": {"feedback": "pid", "pid_gains": 3}}, r"pid_gains must be of the type list\[.*, got 3"),
        ({"filter_arguments": {"boosting": 3}}, r"boosting must be of the type str \| list\[str\], got 3"),
    ],
)
def test_a_file_with_a_wrong_value_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Sizes that the file does not tell would be the largest that the type has."""
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_auto_class_without_a_class_for_the_base_is_refused(tmp_path: Path) -> None:
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForCTC knows no class for a model of type 'llama'"):
        transformers.AutoModelForCTC.from_pretrained(tmp_path)


STOPS = "the checkpoint is of type imgproc_filtered and has filters, which this class would leave out. Load it with "


@pytest.mark.parametrize("stock", [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize(
    "options", [{}, GROUPED, {"attn_implementation": "eager"}, {"experts_implementation": "eager"}]
)
def test_a_stock_class_that_is_asked_by_name_refuses(stock: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """It would make a model of its default sizes, seven billions of parameters, without the filters."""
    model: Any = moved("llama", preset="learned_twicing")
    model.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    message = STOPS + r"AutoModelForCausalLM.from_pretrained\(..., trust_remote_code=True"
    with pytest.raises(ValueError, match=message):
        stock.from_pretrained(tmp_path, **options)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.vocab_size == model.config.vocab_size  # which PEFT asks for
    with pytest.raises(ValueError, match=message):
        stock(config)


def test_stock_classes_of_a_models_parts_refuse_too(tmp_path: Path) -> None:
    parts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**parts, "vocab_size": 50}, vision_config={**parts, **image})
    apply_filter(CLIPModel(config), "twicing").save_pretrained(tmp_path)
    for stock in (CLIPModel, CLIPTextModel, CLIPVisionModel):
        with pytest.raises(ValueError, match=STOPS + r"AutoModel.from_pretrained\("):
            stock.from_pretrained(tmp_path)
    assert len(filtered_layers(AutoModel.from_pretrained(tmp_path))) == 2


def test_its_tokenizer_loads_without_its_code(tmp_path: Path) -> None:
    """It is looked for by a configuration of no type, which stops at nothing."""
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    train_tokenizer(["a few words"], 260).save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert config.base_model_type == "llama"
    assert len(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)) == 260


def test_a_part_of_a_filtered_model_is_saved_with_its_filters(tmp_path: Path) -> None:
    model: Any = moved("llama", preset="learned_twicing", layers=[-1])
    model.model.save_pretrained(tmp_path / "filtered")
    loaded = AutoModel.from_pretrained(tmp_path / "filtered")
    assert torch.equal(output(loaded, inputs("llama")), output(model.model, inputs("llama")))
    assert len(filtered_layers(loaded)) == 1
    remove_filter(model).model.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock/config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaModel"]


def test_a_filter_in_a_part_is_saved_with_the_whole(tmp_path: Path) -> None:
    """The whole was never told of the filter; without a word it would be lost."""
    model: Any = build("bart")
    apply_filter(model.model.decoder, "learned_twicing", layers=[-1])
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if "scalar_bias" in name:
                gain.add_(0.3)
    assert filter_arguments(model) == {"boosting": "learned", "layers": [-1], "stacks": ["model.decoder.layers"]}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs("bart")), output(model, inputs("bart")))


def test_filters_of_parts_that_cannot_be_saved_together_are_refused(tmp_path: Path) -> None:
    model: Any = build("bart")
    apply_filter(model.model.decoder, "twicing")
    apply_filter(model.model.encoder, "sos")
    with pytest.raises(ValueError, match="the parts of this BartForConditionalGeneration have filters that one apply"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("name", "auto_class"), [("t5", "AutoModelForSeq2SeqLM"), ("gpt2", "AutoModelForCausalLM")])
def test_its_configuration_answers_for_the_models_own(name: str, auto_class: str, tmp_path: Path) -> None:
    model: Any = moved(name, preset="twicing")
    model.save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    for field in ("hidden_size", "num_hidden_layers", "vocab_size", "pad_token_id", "is_encoder_decoder", "id2label"):
        assert getattr(config, field) == getattr(model.config, field), field
    assert config.model_type == "imgproc_filtered"
    assert config.get_text_config().vocab_size == 50
    assert not hasattr(config, "no_such_field")
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    config.hidden_size = 64  # by GPT-2's other name for it
    loaded = getattr(transformers, auto_class).from_config(config)
    assert loaded.config.hidden_size == loaded.get_input_embeddings().weight.shape[1] == 64


def test_whispers_generation_settings_stay_in_its_configuration(tmp_path: Path) -> None:
    model: Any = apply_filter(build("whisper", suppress_tokens=[7]), "twicing", stacks="model.decoder.layers")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.suppress_tokens == [7]
    config.save_pretrained(tmp_path / "again")


def test_weights_without_the_filters_numbers_are_refused(tmp_path: Path) -> None:
    """They would else be those that training starts from, which are no filter at all."""
    model = moved("llama", preset="learned_twicing")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = [name for name in tensors if "imgproc_filter" in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost[1:]}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"lack {len(lost) - 1} tensors of the filter .* such as {sorted(lost[1:])[0]}"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boosting": "twicing", "layers": [-1]}, "have 1 tensors of another filter .* such as {last}.boosting_gain"),
        ({"boosting": "learned", "layers": [-1, 0]}, "lack 1 tensors of the filter .* such as {first}.boosting_gain"),
        ({"boosting": "twicing", "layers": [0]}, "have 1 tensors of another filter .* such as {last}.boosting_gain"),
        ({"boosting": "inversion", "layers": [-1]}, "lack 1 tensors of the filter .* such as {last}.inversion_gains"),
    ],
)
@pytest.mark.parametrize(("auto_class", "bare"), [("AutoModelForCausalLM", ""), ("AutoModel", "model.")])
def test_numbers_of_another_filter_are_refused(
    arguments: dict[str, Any], message: str, auto_class: str, bare: str, tmp_path: Path
) -> None:
    """The file was edited: what has been learned would be left out."""
    moved("llama", preset="learned_twicing", layers=[-1]).save_pretrained(tmp_path)
    edit(tmp_path, filter_arguments=arguments)
    places = {name: rf"{{}}layers.{i}.self_attn.imgproc_filter.filter.scalar_bias" for name, i in PLACES.items()}
    # A tensor that is left is named as in the file, one that is missing as in the model.
    start = "" if bare and message.startswith("lack") else "model."
    with pytest.raises(ValueError, match=message.format(**{k: v.format(start) for k, v in places.items()})):
        getattr(transformers, auto_class).from_pretrained(tmp_path)


def test_numbers_of_layers_that_a_class_does_not_have_are_no_error(tmp_path: Path) -> None:
    """T5 tells kinds of words apart by its encoder alone."""
    model = moved("t5", preset="learned_twicing")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert [row["stack"] for row in filtered_layers(loaded)] == ["transformer.encoder.block"] * 2


def test_numbers_of_another_shape_are_refused_where_new_heads_are_let_pass(tmp_path: Path) -> None:
    model = moved("llama", preset="learned_twicing", layers=[-1])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (gain,) = (name for name in tensors if "imgproc_filter" in name)
    save_file({**tensors, gain: tensors[gain][:2].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the weights lack 1 tensors of the filter that config.json names"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("name", "auto_class", "stacks"),
    [
        ("llama", "AutoModel", "model.layers"),
        ("bart", "AutoModel", ["model.decoder.layers"]),
        ("bert", "AutoModelForSequenceClassification", "encoder.layer"),
    ],
)
def test_a_chosen_stack_is_found_with_a_head_and_without(
    name: str, auto_class: str, stacks: Any, tmp_path: Path
) -> None:
    """Its name has the name of the bare model before it, or has not."""
    model = moved(name, preset="learned_twicing", stacks=stacks)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path, dtype=torch.float64)
    assert len(filtered_layers(loaded)) == len(filtered_layers(model))
    given = inputs(name)
    with torch.no_grad():
        found, wanted = (each.base_model(**given)[0] for each in (loaded, model))
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()
    loaded.save_pretrained(tmp_path / "again")
    again = getattr(transformers, auto_class).from_pretrained(tmp_path / "again")
    assert filtered_layers(again) == filtered_layers(loaded)


def test_a_filter_goes_into_a_model_whose_layers_are_on_disk(tmp_path: Path) -> None:
    """Between two passes their tensors are nowhere; the filter's numbers are where the layer computes."""
    model = build("llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    places = {**dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")}
    places |= {f"model.layers.{i}": "disk" for i in range(3)}
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded", "dtype": torch.float64}
    loaded = apply_filter(LlamaForCausalLM.from_pretrained(tmp_path, **options), "twicing")
    numbers = apply_filter(remove_filter(loaded), "learned_twicing")
    assert {value.device.type for name, value in numbers.named_parameters() if "imgproc" in name} == {"cpu"}
    given = inputs("llama")
    assert torch.equal(output(numbers, given), output(model, given))
