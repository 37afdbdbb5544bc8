"""Filtered models are saved as what they are, and load with their filters in a process without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from hf_imgproc_attn import apply_filter, filtered_layers, remove_filter
from hf_imgproc_attn.models.any_filter import filter_arguments
from hf_imgproc_attn.models.configuration_imgproc_filtered import ImgProcFilteredConfig
from tests.any_model.architectures import DECODERS, GROUPED, build, inputs, output
from tests.helpers import prepared_python, run_command

ELSEWHERE = """
import json, sys, torch, transformers
sys.modules["hf_imgproc_attn"] = None
folder, auto_class, stock = sys.argv[1:]
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


@pytest.mark.parametrize(
    ("name", "auto_class", "fields"),
    [
        ("llama", "AutoModelForCausalLM", {"preset": "learned_twicing", "layers": [-1, 0]}),
        ("dinov2", "AutoModel", {"preset": "alibi", "boosting": "learned"}),
        ("bart", "AutoModelForSeq2SeqLM", {"preset": "twicing", "stacks": "model.decoder.layers"}),
    ],
)
def test_a_process_without_the_package_loads_it(
    name: str, auto_class: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, given = moved(name, **fields), inputs(name, padded=True)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save(output(model, given), tmp_path / "saved/wanted.pt")
    torch.save(given, tmp_path / "saved/given.pt")
    code = [prepared_python(), "-I", "-c", ELSEWHERE, str(tmp_path / "saved"), auto_class, type(model).__name__]
    done = run_command(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imgproc_filtered\n"
    assert "newly initialized" not in done.stderr
    assert "not used" not in done.stderr


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


def test_a_base_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    said["base_model_type"] = "gpt17"
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match="base_model_type must be a model type that Transformers knows, got 'gpt17'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    said["base_model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match="AutoModelForCTC knows no class for a model of type 'llama'"):
        transformers.AutoModelForCTC.from_pretrained(tmp_path)


def test_a_stock_class_does_not_load_it_unfiltered(tmp_path: Path) -> None:
    moved("llama", preset="twicing").save_pretrained(tmp_path)
    # Its own sizes, not the model's: here smaller ones than its defaults.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises((RuntimeError, ValueError), match="size|mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path, **sizes)


def test_a_stock_class_that_has_its_sizes_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It finds the tensors and knows nothing of the filters, so the warning is all that there can be."""
    model: Any = moved("llama", preset="learned_twicing")
    model.save_pretrained(tmp_path)
    sizes = {name: getattr(model.config, name) for name in GROUPED}
    _, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **sizes)
    assert "You are using a model of type `imgproc_filtered` to instantiate a model of type `llama`" in caplog.text
    assert {name.rpartition(".")[2] for name in info["unexpected_keys"]} == {"boosting_gain"}


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
