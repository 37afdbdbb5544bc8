"""What the scripts' Trainer does otherwise than the library's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_imgproc_attn.training_support import trainer_setup
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_setup import build_causal_lm, build_image_classifier
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from hf_imgproc_attn.training_support.trainer import ScriptTrainer
from tests.training.conftest import TINY_GPT2, TINY_VIT


class RandomPixels(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3}


def our_vit(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    arguments = ModelArguments(preset="bilateral_twicing", config_overrides=TINY_VIT)
    return build_image_classifier(arguments, list("abc"), (8, 8))[0]


def trainer_for(model: PreTrainedModel, folder: Path, **options: Any) -> ScriptTrainer:
    fields = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "learning_rate": 1e-2}
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**fields, **options})
    return ScriptTrainer(model, args=args, train_dataset=RandomPixels(), eval_dataset=RandomPixels())


def test_saved_weights_are_read_back_whole(tmp_path: Path) -> None:
    """Checkpoints hold a ViT under other names than its parameters have; ``load_state_dict`` alone would drop them."""
    from safetensors.torch import load_file

    saved, other = our_vit(0), our_vit(1)
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) != set(saved.state_dict())
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in saved.state_dict().items())
    # Its own names go on working.
    assert not any(other.load_state_dict(our_vit(2).state_dict()))


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trainer_for(our_vit(0), tmp_path, **options, load_best_model_at_end=True, learning_rate=0.5)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]  # the last model is not the best one
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_incomplete_batches_are_dropped_in_training_and_kept_in_evaluation(tmp_path: Path) -> None:
    trainer = trainer_for(our_vit(0), tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    assert sum(len(batch["labels"]) for batch in trainer.get_train_dataloader()) == 20
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 21
    assert trainer.args.dataloader_drop_last
    assert trainer.predict(RandomPixels()).predictions.shape == (21, 3)


def test_use_cache_of_the_configuration_is_restored(tmp_path: Path) -> None:
    arguments = ModelArguments(preset="twicing", config_overrides=TINY_GPT2)
    language_model, _ = build_causal_lm(arguments, train_tokenizer(["a"], 258), 16)
    trainer = trainer_for(language_model, tmp_path)
    assert language_model.config.use_cache is False
    trainer.restore_configuration()
    assert language_model.config.use_cache is True
    image_model = our_vit(0)
    trainer_for(image_model, tmp_path)
    assert "use_cache" not in json.loads(image_model.config.to_json_string(use_diff=False))


def test_a_bandwidth_at_its_bound_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hf_imgproc_attn"), "propagate", True)
    name = "vit.layers.1.attention.filter.scalar_bias.content_log_bandwidth"
    model = our_vit(0)
    trainer_for(model, tmp_path / "quiet", logging_steps=1, save_strategy="no").train()
    assert not [record for record in caplog.records if "reached a bound" in record.message]
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(-20.0)
    trainer_for(model, tmp_path / "loud", logging_steps=1, save_strategy="no").train()
    said = [record.message for record in caplog.records if "reached a bound" in record.message]
    assert len(said) == 1
    assert name in said[0]


def test_zero3_does_not_share_the_model_that_one_process_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a run the first process reads the filters' numbers; the others would be waited for."""
    from transformers.integrations import deepspeed

    class Settings:
        def is_zero3(self) -> bool:
            return True

    settings = Settings()
    deepspeed.set_hf_deepspeed_config(settings)
    seen: list[Any] = []
    monkeypatch.setattr(
        trainer_setup, "saved_filters", lambda folder: seen.append((folder, deepspeed.is_deepspeed_zero3_enabled()))
    )
    run: Any = SimpleNamespace(training_args=SimpleNamespace(output_dir="here", hf_deepspeed_config=settings))
    trainer: Any = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True, model=torch.nn.Linear(1, 1))
    try:
        trainer_setup._filters(run, trainer)
        assert seen == [("here", False)]
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
