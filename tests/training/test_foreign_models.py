"""Training models of any type with a filter in their layers: what is trained, saved, resumed, adapted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import train_causal_lm
import train_image_classification
import train_text_classification
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    DeiTConfig,
    DeiTForImageClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_imgproc_attn import apply_filter, filtered_layers
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.measure.context import _load as load_for_context
from hf_imgproc_attn.robustness.texts import text_perplexity
from hf_imgproc_attn.training_support.text_data import TextSplit
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT

COMMON = ["--disable_tqdm", "true", "--use_cpu", "--max_eval_samples", "20", "--max_train_samples", "120"]
SHORT = [*COMMON, "--save_strategy", "no", "--max_steps", "2"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock checkpoints: ``llama`` and ``distilbert`` with their tokenizers, ``deit``."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    lines = ["import a name from a module", "a class is made of methods"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = train_tokenizer(lines, 280)
    llama = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=None)
    LlamaForCausalLM(llama).to(torch.float16).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    tokenizer = train_tokenizer(lines, 280, for_classifier=True)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, hidden_dim=32, n_layers=2, n_heads=2)
    DistilBertForMaskedLM(config).save_pretrained(folder / "distilbert")
    tokenizer.save_pretrained(folder / "distilbert")
    DeiTForImageClassification(DeiTConfig(**sizes, image_size=8, patch_size=2, num_labels=3)).save_pretrained(
        folder / "deit"
    )
    return folder


def run(script: Any, folder: Path, *words: str) -> dict[str, Any]:
    assert script.main([*words, "--output_dir", str(folder)]) == 0
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (train_causal_lm, "llama"),
        (train_text_classification, "distilbert"),
        (train_text_classification, "llama"),
        (train_image_classification, "deit"),
    ],
)
def test_a_model_of_another_type_is_trained_with_the_filter(
    script: Any, name: str, stock: Path, tmp_path: Path
) -> None:
    words = [*SHORT, "--preset", "learned_twicing", "--boosted_layers", "-1", "--learning_rate", "0.1"]
    record = run(script, tmp_path / "run", "--model_name_or_path", str(stock / name), *words)
    said = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert said["model_type"] == "imgproc_filtered"
    assert said["filter_arguments"] == {"boosting": "learned", "layers": [-1]}
    trained = load_file(tmp_path / "run/model.safetensors")
    (gain,) = [value for key, value in trained.items() if "boosting_gain" in key]
    assert gain.dtype == torch.float32
    assert gain.abs().min() > 0  # it started at 0
    assert record["model_config"]["boosting"] == "learned"
    assert [row["layer"] for row in record["applied_filter"]["layers"]] == ["1"]
    assert [row["gain"] for row in record["filter_summary"]["rows"]] == pytest.approx(gain.tolist(), rel=1e-5)
    assert {row["layer"] for row in record["filter_summary"]["rows"]} == {1}


def test_a_run_goes_on_with_its_filter(stock: Path, tmp_path: Path) -> None:
    """Interrupted and resumed is the same as trained in one go; a filtered checkpoint goes on without a preset."""
    words = [*COMMON, "--model_name_or_path", str(stock / "llama"), "--preset", "learned_twicing"]
    words += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "0.01"]
    whole = run(train_causal_lm, tmp_path / "whole", *words, "--save_strategy", "no", "--max_steps", "4")
    words += ["--save_steps", "2", "--save_strategy", "steps"]
    run(train_causal_lm, tmp_path / "parts", *words, "--max_steps", "2")
    parts = run(train_causal_lm, tmp_path / "parts", *words, "--max_steps", "4", "--resume")
    assert parts["resumed_from"].endswith("checkpoint-2")
    assert parts["weights_sha256"] == whole["weights_sha256"]
    start = ["--model_name_or_path", str(tmp_path / "whole")]
    again = run(train_causal_lm, tmp_path / "again", *SHORT, *start)
    assert again["model_config"]["boosting"] == "learned"
    assert again["applied_filter"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("merge", [False, True])
def test_lora_trains_adapters_and_the_gains(merge: bool, stock: Path, tmp_path: Path) -> None:
    words = [*COMMON, "--model_name_or_path", str(stock / "llama"), "--preset", "learned_twicing", "--peft", "lora"]
    words += ["--peft_rank", "2", "--peft_targets", "q_proj,v_proj", "--learning_rate", "0.1"]
    words += [
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
        "--save_steps",
        "2",
        "--save_strategy",
        "steps",
    ]
    words += ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    words += ["--peft_merge"] if merge else []
    run(train_causal_lm, tmp_path / "run", *words, "--max_steps", "2")
    record = run(train_causal_lm, tmp_path / "run", *words, "--max_steps", "3", "--resume")
    # 2 x 2 layers of two projections 16 x 16 at rank 2, and a gain for each of 2 x 2 heads.
    assert record["parameters"]["trained"] == 2 * 2 * 2 * 16 * 2 + 4
    assert all(row["gain"] for row in record["filter_summary"]["rows"])
    if merge:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert not (tmp_path / "run/base").exists()
    else:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "run/base")
        assert not any(gain.any() for name, gain in base.named_parameters() if "boosting_gain" in name)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run").merge_and_unload()
        by_folder = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
        torch.testing.assert_close(by_folder(torch.arange(9)[None]).logits, loaded(torch.arange(9)[None]).logits)
    assert type(loaded) is LlamaForCausalLM
    assert len(filtered_layers(loaded)) == 2
    gains = [gain.tolist() for name, gain in loaded.named_parameters() if "boosting_gain" in name]
    found = [row["gain"] for row in record["filter_summary"]["rows"]]
    assert [value for gain in gains for value in gain] == pytest.approx(found, rel=1e-5)
    changed = LlamaForCausalLM.from_pretrained(stock / "llama", dtype=torch.float32)
    kept, new = changed.model.layers[0].self_attn, loaded.model.layers[0].self_attn
    assert torch.equal(kept.k_proj.weight, new.k_proj.weight)
    assert not torch.equal(kept.q_proj.weight, new.q_proj.weight)


def test_a_new_head_is_trained_beside_the_adapters(stock: Path, tmp_path: Path) -> None:
    words = [*SHORT, "--model_name_or_path", str(stock / "distilbert"), "--preset", "twicing", "--peft", "lora"]
    record = run(train_text_classification, tmp_path / "run", *words, "--peft_targets", "q_lin", "--peft_merge")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert len(filtered_layers(loaded)) == 2
    head = sum(value.numel() for name, value in loaded.named_parameters() if "distilbert." not in name)
    assert record["parameters"]["trained"] == 2 * 2 * 16 * 8 + head


def test_an_own_model_is_adapted_too(tmp_path: Path, stock: Path) -> None:
    words = ["--config_overrides", "n_embd=16", "n_layer=2", "n_head=2", "--block_size", "16"]
    run(train_causal_lm, tmp_path / "own", *SHORT, "--preset", "learned_twicing", *words)
    words = [*SHORT, "--model_name_or_path", str(tmp_path / "own"), "--peft", "lora", "--peft_rank", "2"]
    record = run(train_causal_lm, tmp_path / "run", *words, "--peft_filter", "false")
    assert record["parameters"]["trained"] == 2 * 2 * (16 + 48)
    assert record["model_config"]["boosting"] == "learned"


def test_without_a_filter_it_is_the_baseline(stock: Path, tmp_path: Path) -> None:
    words = [*SHORT, "--model_name_or_path", str(stock / "llama"), "--preset", "softmax"]
    record = run(train_causal_lm, tmp_path / "run", *words)
    assert "applied_filter" not in record
    assert record["model_config"]["model_type"] == "llama"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "preset must be given for a model of type llama, which has no filter yet"),
        (["--preset", "bilateral"], "position_kernel must be one of gaussian, alibi, relative_buckets for layers of"),
        (["--preset", "twicing", "--boosted_layers", "2"], "layers must be integers from -2 to 1 (model.layers has 2"),
        (["--preset", "twicing", "--boosted_layers", "last"], "boosted_layers must be integers with commas between"),
        (["--preset", "twicing", "--filter_stacks", "encoder"], "stacks must be among model.layers, got 'encoder'"),
        (["--preset", "twicing", "--config_overrides", "n_layer=1"], "config_overrides must be fields of the filter"),
        (["--preset", "twicing", "--peft_rank", "4"], "peft_rank must be given with peft, got 4"),
        (["--preset", "twicing", "--peft", "lora", "--peft_rank", "0"], "peft_rank must be an integer >= 1, got 0"),
        (["--preset", "twicing", "--peft", "lora", "--peft_targets", "nowhere"], "peft_targets: "),
        (["--preset", "twicing", "--peft", "lora", "--peft_filter"], "peft_filter must be off for a filter without"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--model_name_or_path", str(stock / "llama")]
    assert train_causal_lm.main([*SHORT, *start, *words, "--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert len(line.splitlines()) == 1


def test_a_model_that_sees_the_words_to_predict_is_no_language_model(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers loads such a BERT and warns; its loss would fall to 0 by copying the answers."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = train_tokenizer(["import a name from a module"], 280)
    for is_decoder, status in ((False, 2), (True, 0)):
        folder = tmp_path / str(is_decoder)
        config = BertConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=32, is_decoder=is_decoder)
        BertLMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        words = [*SHORT, "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / f"run{is_decoder}")]
        assert train_causal_lm.main([*words, "--preset", "softmax"]) == status
        said = "must be a causal language model, got one of type bert whose tokens see later ones"
        assert (said in capsys.readouterr().err) == (not is_decoder)
    with pytest.raises(UsageError, match="the model must be a causal language model"):
        text_perplexity(BertLMHeadModel.from_pretrained(tmp_path / "False"), tokenizer, TextSplit(["a\n"]), 8)
    with pytest.raises(UsageError, match="checkpoint .*False' must be a causal language model"):
        load_for_context(str(tmp_path / "False"))


def test_adapters_need_peft_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SHORT, "--preset", "twicing", "--peft", "lora", "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main(words) == 2
    assert "model_name_or_path must be given with peft lora" in capsys.readouterr().err
    monkeypatch.setattr("hf_imgproc_attn.errors.missing_packages", lambda extra: ["peft"] if extra == "peft" else [])
    assert train_causal_lm.main(words) == 2
    assert 'this needs peft, which is not installed: pip install ".[peft]"' in capsys.readouterr().err


def test_a_filtered_checkpoint_keeps_its_filter(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = apply_filter(LlamaForCausalLM.from_pretrained(stock / "llama"), "twicing")
    model.save_pretrained(tmp_path / "filtered")  # type: ignore[operator]
    for preset, message in (("sos", "boosting='twicing', and not 'sos'"), ("softmax", "='twicing', and not 'none'")):
        words = [*SHORT, "--model_name_or_path", str(tmp_path / "filtered"), "--preset", preset]
        assert train_causal_lm.main([*words, "--output_dir", str(tmp_path / "run")]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert "`imgproc-attn convert` puts another in its place" in line
