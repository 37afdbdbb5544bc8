"""``finetune_real.py``: the control costs nothing, a fixed filter does at once and less after training."""

from __future__ import annotations

import json
from pathlib import Path

import finetune_real
import pytest
import torch
from finetune_real import Settings, cross_entropy, summarise, table
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights large enough that attention matters; no tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=13, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 12
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def test_a_run_writes_curves_and_a_table(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recovery.json"
    words = [str(llama), "--steps", "16", "--seeds", "3", "5", "--batch", "8", "--length", "24", "--held_out", "16"]
    assert finetune_real.main([*words, "--learning_rate", "1e-2", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == ["stock", "twicing", "learned_twicing"]
    assert rows["stock"]["start"] == pytest.approx(0, abs=1e-6)
    assert rows["learned_twicing"]["start"] == pytest.approx(0, abs=1e-6), "its gains start at 0"
    assert rows["twicing"]["start"] > 0.01
    assert rows["twicing"]["end"][0] < rows["twicing"]["start"], "it recovers"
    assert rows["stock"]["beside_control"] == [0, 0, 0]
    for curves in record["curves"].values():
        assert list(curves) == ["3", "5"]
        for curve in curves.values():
            assert [step for step, _ in curve] == [0, 1, 2, 4, 8, 16]
    assert record["curves"]["twicing"]["3"][-1] != record["curves"]["twicing"]["5"][-1], "other texts"
    assert "| twicing | +" in capsys.readouterr().out
    assert finetune_real.main([*words, "--output", str(output)]) == 2
    assert "--force replaces it" in capsys.readouterr().err


def test_cross_entropy_is_that_of_the_library(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    texts = torch.randint(0, 13, (5, 9), generator=torch.Generator().manual_seed(0))
    assert cross_entropy(model, texts, 2) == pytest.approx(model(texts, labels=texts).loss.item(), rel=1e-5)


def test_differences_are_paired_by_seed() -> None:
    curves = {
        "stock": {"0": [[0, 0.0], [4, 0.1]], "1": [[0, 0.0], [4, 0.3]]},
        "twicing": {"0": [[0, 0.5], [4, 0.3]], "1": [[0, 0.5], [4, 0.5]]},
    }
    row = summarise(curves)[1]
    assert row["start"] == 0.5
    assert row["beside_control"] == pytest.approx([0.2, 0.2, 0.2])
    half = 12.706205 * 0.1  # Student's t with one degree of freedom, and the standard error of the mean
    assert row["end"] == pytest.approx([0.4, 0.4 - half, 0.4 + half])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "steps must be an integer >= 1, got 0"),
        ("--length 1", "length must be an integer >= 2, got 1"),
        ("--seeds 1", "seeds must be two or more different integers"),
        ("--seeds 1 1", "seeds must be two or more different integers"),
        ("--seeds 1 -2", "seeds must be two or more different integers"),
        ("--learning_rate 0", "learning_rate must be a number > 0, got 0.0"),
        ("--variants twicing twicing", "variants must be different presets"),
        ("--variants twiceing", "did you mean twicing?"),
        ("--variants rope", "variants: rope: "),
        ("--layers 7", "layers"),
    ],
)
def test_mistakes_are_one_line(llama: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_real.main([str(llama), *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_real.main([str(tmp_path / "nowhere")]) == 2
    assert "model must be a local path or a Hub name" in capsys.readouterr().err
    assert finetune_real.main([str(tmp_path)]) == 2
    assert "model must be a causal language model, got" in capsys.readouterr().err


def test_settings_measure_halves_of_the_way() -> None:
    assert Settings(steps=100).measured_at == [0, 6, 12, 25, 50, 100]
    assert Settings(steps=1).measured_at == [0, 1]


def test_the_page_shows_the_records() -> None:
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    records = sorted((ROOT / "training" / "results" / "recovery").glob("*.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert f"](../training/results/recovery/{path.name})" in page
        assert table(record) in page
        assert len(record["settings"]["seeds"]) == 3
        assert not record["git"]["dirty"]
