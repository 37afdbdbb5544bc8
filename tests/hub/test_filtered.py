"""A model of another type with a filter, from training to its name on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_checkpoint
import pytest
import torch
import train_causal_lm
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from hf_imgproc_attn.backbones import FILTERED_MODEL_TYPE
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.hub.downloading import list_checkpoints, pull
from hf_imgproc_attn.hub.publishing import publish
from hf_imgproc_attn.models import configuration_imgproc_filtered
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.hub.server import HubServer
from tests.hub.test_journey import run_elsewhere

SHORT = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--max_steps", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that start from a stock Llama: ``model`` has a learned gain, ``adapter`` is one."""
    folder = tmp_path_factory.mktemp("filtered_runs")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["import a name from a module"], 280)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "stock")
    tokenizer.save_pretrained(folder / "stock")
    (folder / "stock/README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    for name, more in (("model", []), ("adapter", ["--peft", "lora"])):
        words = [*SHORT, "--model_name_or_path", str(folder / "stock"), "--preset", "learned_twicing", *more]
        words += ["--boosted_layers", "-1", "--learning_rate", "0.1", "--output_dir", str(folder / name)]
        assert train_causal_lm.main([*words, "--max_train_samples", "100", "--max_eval_samples", "20"]) == 0
    return folder


def test_one_model_type_everywhere() -> None:
    assert FILTERED_MODEL_TYPE == configuration_imgproc_filtered.FILTERED_MODEL_TYPE


def test_a_filtered_llama_is_published_and_generates_elsewhere(
    hub: HubServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs / "model"
    assert evaluate_checkpoint.main([str(folder), "--max_samples", "10", "--force"]) == 0
    publication = publish(folder, "llama", private=False)
    assert publication is not None
    assert publication.model_class == "LlamaForCausalLM"
    assert "license: cc-by-4.0 (of the base model, stock)" in capsys.readouterr().out
    files = hub.repo("ann/llama").files()
    assert json.loads(files["config.json"])["model_type"] == "imgproc_filtered"
    card = files["README.md"].decode()
    assert "A model of the class LlamaForCausalLM with `learned_twicing` self-attention" in card
    assert "In every filtered layer and head" in card
    assert "from 0, where this is the stock model; the model's own positions are what they are" in card
    assert "learned positions are added" not in card
    assert "| model.layers | 1 | dot_product | its own | learned | none | 2 |" in card
    assert "| layer | `gain` (learned) |" in card
    assert "license: cc-by-4.0\n" in card
    assert "word swap" in card
    assert str(runs) not in "".join(content.decode(errors="replace") for content in files.values())

    options = {"max_new_tokens": 8, "do_sample": False}
    arguments = ("text-generation", "ann/llama", publication.revision, "The import")
    answer = run_elsewhere(hub, tmp_path / "elsewhere", *arguments, **options)
    assert answer == pipeline("text-generation", model=str(folder), device="cpu")("The import", **options)

    download = pull("ann/llama", output=tmp_path / "pulled")
    assert (download.model_type, download.remarks) == ("imgproc_filtered", [])
    assert list(tmp_path.joinpath("pulled").glob("any_*.py"))
    (listed,) = list_checkpoints("ann")
    assert set(listed.variant.split()) == {"learned_twicing", "imgproc_filtered"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other cache"))
    loaded = AutoModelForCausalLM.from_pretrained("ann/llama")
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)


def test_an_adapter_is_evaluated_but_not_published_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs / "adapter"
    with pytest.raises(UsageError, match="holds an adapter, not a model: train with --peft_merge"):
        publish(folder, "ann/adapter", dry_run=True)
    assert evaluate_checkpoint.main([str(folder), "--max_samples", "10"]) == 0
    measured = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))["results"]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["applied_filter"]["arguments"] == {"boosting": "learned", "layers": [-1]}
    assert measured[0]["metric"] == "perplexity"
