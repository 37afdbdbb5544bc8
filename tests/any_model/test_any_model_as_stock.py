"""What users do with stock models works with filtered ones: adapters, attentions, settings on loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from hf_imgproc_attn import apply_filter, filtered_layers
from tests.any_model.architectures import TEXT, build, inputs, text

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT


@pytest.mark.parametrize("preset", ["learned_twicing", "neutreno"])
def test_an_adapter_trains_and_keeps_the_gains(preset: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["imgproc_filter"])
    model: Any = get_peft_model(apply_filter(build("llama"), preset), config).eval()  # type: ignore[arg-type]
    before = model(text()).logits
    gains = [value for name, value in model.named_parameters() if value.requires_grad and "imgproc_filter" in name]
    with torch.no_grad():
        for gain in gains:
            gain.add_(0.3)
    wanted = model(text()).logits
    assert gains
    assert not torch.equal(wanted, before)
    assert len(filtered_layers(model)) == 3
    options: dict[str, Any] = {"input_ids": text(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**options), model.generate(use_cache=False, **options))

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again: Any = PeftModel.from_pretrained(apply_filter(build("llama"), preset), tmp_path / "adapter")  # type: ignore[arg-type]
    merged = again.merge_and_unload().eval()
    assert (merged(text()).logits - wanted).abs().max() < 1e-12
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (loaded(text()).logits - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("base", ["twicing", "neutreno"])
def test_an_adapter_of_another_filter_is_refused(base: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["imgproc_filter"])
    model: Any = get_peft_model(apply_filter(build("llama"), "learned_twicing"), config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    other: Any = apply_filter(build("llama"), base)
    with pytest.raises((RuntimeError, KeyError), match="numbers of another filter|imgproc_filter.filter.scalar_bias"):
        PeftModel.from_pretrained(other, tmp_path)
    state = {name: value for name, value in model.get_base_model().state_dict().items() if "original" in name}
    renamed = {name.replace("original_module.", ""): value for name, value in state.items()}
    with pytest.raises(RuntimeError, match="boosting_gain in model.layers.0.self_attn.imgproc_filter are numbers of"):
        apply_filter(build("llama"), base).load_state_dict(renamed, strict=False)


def test_an_added_adapter_is_saved_alone(tmp_path: Path) -> None:
    model: Any = apply_filter(build("llama"), "twicing")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "config.json" not in names  # a folder with one is taken for a whole model
    assert not [name for name in names if name.endswith(".py")]


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("by_config", [False, True])
def test_attentions_stand_at_the_places_of_their_layers(name: str, by_config: bool) -> None:
    def attentions(model: Any) -> Any:
        model.set_attn_implementation("eager")
        model.config.output_attentions = by_config
        return model(**inputs(name), **({} if by_config else {"output_attentions": True})).attentions

    stock, found = attentions(build(name)), attentions(apply_filter(build(name), "twicing", layers=[1]))
    assert len(found) == len(stock) == 3
    assert torch.equal(found[0], stock[0])
    # Most models take the softmax of their eager attention in single precision; GPT-2 does not.
    tolerance = 1e-12 if name == "gpt2" else 1e-6
    assert (found[1] - (2 * stock[1] - stock[1] @ stock[1])).abs().max() < tolerance
    fused: Any = apply_filter(build(name), "twicing", layers=[1])
    assert not fused(**inputs(name), output_attentions=True).attentions  # as stock: this implementation returns none


def test_settings_given_on_loading_reach_the_model(tmp_path: Path) -> None:
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    config = BertConfig(**TEXT, id2label=labels, label2id={label: number for number, label in labels.items()})
    apply_filter(BertForSequenceClassification(config), "twicing").save_pretrained(tmp_path)  # type: ignore[operator]
    load = AutoModelForSequenceClassification.from_pretrained
    plain = load(tmp_path).config
    assert (plain.id2label, plain.label2id) == (labels, config.label2id)
    given = load(tmp_path, hidden_dropout_prob=0.37, problem_type="multi_label_classification").config
    assert (given.hidden_dropout_prob, given.problem_type) == (0.37, "multi_label_classification")
    assert load(tmp_path, num_labels=2, ignore_mismatched_sizes=True).classifier.out_features == 2
    changed = AutoConfig.from_pretrained(tmp_path, num_labels=2)
    assert AutoModelForSequenceClassification.from_config(changed).config.num_labels == 2


@pytest.mark.parametrize("layers", [range(1, 3), {1, 2}, np.array([1, -1]), [np.int64(1), 2], torch.tensor([1, 2])])
def test_layers_may_be_any_integers_and_are_saved(layers: Any, tmp_path: Path) -> None:
    model: Any = apply_filter(build("llama"), "twicing", layers=layers)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [row["layer"] for row in filtered_layers(loaded)] == [1, 2]
