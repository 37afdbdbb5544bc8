"""``finetune_real.py``: the control stays as it was, a fixed filter costs something at once, less after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finetune_real
import pytest
import torch
from finetune_real import Settings, rate
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from hf_imgproc_attn.study.recovery import in_short, read_records, recovered, table
from hf_imgproc_attn.training_support import teachers
from hf_imgproc_attn.training_support.teachers import cross_entropy, nearest, sentence_vectors
from tests.helpers import ROOT

RECORDS = sorted((ROOT / "training" / "results" / "recovery").glob("*.json"))
WORDS = ["a", "filter", "takes", "the", "mean", "of", "what", "is", "near", "and", "leaves", "out", "noise", "far"]


def enlarge_matrices(model: torch.nn.Module, factor: float) -> None:
    """So that attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= factor


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights large enough that attention matters; no tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=13, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1)
    model = LlamaForCausalLM(config)
    enlarge_matrices(model, 12)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of :data:`WORDS`, and a file of different texts of them beside it."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=16))
    enlarge_matrices(model, 20)
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[index] for index in torch.randint(len(WORDS), (4 + row % 5,), generator=generator).tolist())
        for row in range(90)
    ]
    (folder / "texts.txt").write_text("\n".join([*lines, "", lines[0]]) + "\n", encoding="utf-8")
    return folder


def of_encoder(encoder: Path, words: str) -> list[str]:
    given = f"--seeds 0 1 --batch 4 --length 12 --held_out 16 --texts {encoder / 'texts.txt'} {words}"
    return [str(encoder), *given.split()]


def test_a_run_writes_curves_and_a_table(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recovery.json"
    words = [str(llama), "--steps", "16", "--seeds", "3", "5", "--batch", "8", "--length", "16", "--held_out", "16"]
    assert finetune_real.main([*words, "--learning_rate", "1e-3", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    rows = {row.variant: row for row in recovered(record)}
    assert list(rows) == ["stock", "twicing", "learned_twicing"]
    assert rows["stock"].start == pytest.approx(0, abs=1e-6)
    assert rows["learned_twicing"].start == pytest.approx(0, abs=1e-6), "its gains start at 0"
    assert rows["twicing"].start > 0.01
    assert rows["twicing"].end.mean < 0.9 * rows["twicing"].start, "it recovers"
    assert abs(rows["stock"].end.mean) < 0.1 * rows["twicing"].start, "it has nothing to learn"
    assert rows["stock"].beside is None
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


def test_an_encoder_recovers_its_sentence_vectors(encoder: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "recovery.json", tmp_path / "recovery.png"
    words = f"--steps 8 --batch 8 --learning_rate 1e-3 --variants twicing --output {output} --plot {plot}"
    assert finetune_real.main(of_encoder(encoder, words)) == 0
    (record,) = read_records([output])
    assert record["rows"] == 90, "a text that comes twice counts once"
    assert record["texts"] == "texts.txt"
    stock, twicing = recovered(record)
    assert stock.neighbours == (1, 1)
    assert abs(stock.end.mean) < 0.01 * twicing.start, "it has nothing to learn"
    assert twicing.end.mean < 0.7 * twicing.start
    assert twicing.neighbours is not None
    assert twicing.neighbours[0] < twicing.neighbours[1] < 1
    assert [step for step, _ in record["neighbours"]["twicing"]["1"]] == [0, 1, 2, 4, 8]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_seeds_learn_from_texts_in_another_order_and_none_from_those_held_out(encoder: Path) -> None:
    model, tokenizer = finetune_real.load(str(encoder))
    teacher = teachers.SentenceTeacher(model, 12, 4, 16, tokenizer, encoder / "texts.txt", 3)

    def rows(lessons: list[teachers.Lesson]) -> set[tuple[int, ...]]:
        return {
            tuple(ids[shown.bool()].tolist())
            for lesson in lessons
            for ids, shown in zip(lesson["input_ids"], lesson["attention_mask"], strict=True)
        }

    first, again, other = (rows(teacher.lessons(seed, 3)) for seed in (0, 0, 1))
    assert first == again
    assert len(first) == 12
    assert first != other
    held_out = rows(teacher.held_out)
    assert len(held_out) == 16
    assert not held_out & (first | other)


def test_padding_does_not_count(encoder: Path) -> None:
    model, tokenizer = finetune_real.load(str(encoder))
    short, long = (dict(tokenizer(text, return_tensors="pt")) for text in ("a filter", "the mean of noise"))
    both = dict(tokenizer(["a filter", "the mean of noise"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        together = sentence_vectors(model(**both).last_hidden_state, both)
        apart = torch.cat([sentence_vectors(model(**one).last_hidden_state, one) for one in (short, long)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_nearest_vector_is_another_one() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.9]]), dim=-1)
    assert nearest(vectors).tolist() == [1, 0, 3, 2]


def record_of(curves: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {"layers": [-2, -1], "steps": 4, "variants": [name for name in curves if name != "stock"]}
    return {"model_type": "llama", "parameters": 260032, "settings": settings, "curves": curves, **more}


def test_differences_are_paired_by_seed() -> None:
    ends = {"stock": (0.1, 0.3, 0.2), "twicing": (0.3, 0.6, 0.3)}
    starts = {"stock": 0.0, "twicing": 0.5}
    curves = {
        name: {str(seed): [[0, starts[name]], [4, end]] for seed, end in enumerate(values)}
        for name, values in ends.items()
    }
    control, row = recovered(record_of(curves))
    assert control.beside is None
    assert row.start == 0.5
    assert row.beside is not None
    assert row.beside.summary.values == pytest.approx([0.2, 0.3, 0.1])
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with two degrees of freedom, and the standard error of the mean
    assert row.beside.summary.t_interval.low == pytest.approx(0.2 - half)
    assert row.won.summary.values == pytest.approx([-0.2, 0.1, -0.2])
    assert not row.recovers, "one seed of three lost more"
    assert f"| twicing | +0.5000 | +0.4000 ({0.4 - 4.302653 * 0.1:+.4f} to" in table(record_of(curves))
    assert "| 20 % |" in table(record_of(curves))


def test_the_sentence_counts_filters_that_cost_something_and_those_still_behind() -> None:
    def curves(start: float, *ends: float) -> dict[str, Any]:
        return {str(seed): [[0, start], [4, end]] for seed, end in enumerate(ends)}

    record = record_of(
        {
            "stock": curves(0, 0.001, 0.002, 0.0015),
            "behind": curves(0.5, 0.101, 0.1024, 0.1012),
            "caught_up": curves(0.5, 0.002, 0.0011, 0.0016),
            "free": curves(0, 0.0011, 0.0019, 0.0017),
        }
    )
    told = in_short([record])
    assert "Of 3 filters in trained models 2 cost something at once, and 2 of these cost less" in told
    assert "1 of the 3 are still worse, in 2 no difference is seen." in told


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
        ("--layers 7", "layers must be integers from -2 to 1"),
        ("--length 33", "length must be an integer <= 32, what this model can read, got 33"),
        ("--texts some.txt", "texts are for encoders"),
        ("--records some.json", "either a model or --records must be given"),
        ("--steps 8 --learning_rate 1e30 --batch 2 --held_out 2 --length 8", "stock diverges at step "),
    ],
)
def test_mistakes_are_one_line(llama: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_real.main([str(llama), *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 19", "texts must be 92 different ones or more (held_out + steps x batch), got 90 in "),
        ("--length 17", "length must be an integer <= 16, what this model can read, got 17"),
        ("--held_out 2", "held_out must be an integer >= 3 for an encoder, got 2"),
        ("--layers 2", "layers must be integers from -2 to 1"),
        ("--variants delta", "variants: delta: "),
        ("--texts nowhere.txt", "texts must be a text file in UTF-8, got 'nowhere.txt'"),
    ],
)
def test_mistakes_with_an_encoder_are_one_line(
    encoder: Path, words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "recovery.json"
    assert finetune_real.main([*of_encoder(encoder, "--steps 2"), "--output", str(output), *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.exists()


def test_models_of_another_kind_are_refused(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    CLIPModel(
        CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 8, "patch_size": 4})
    ).save_pretrained(tmp_path / "clip")
    T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)).save_pretrained(
        tmp_path / "t5"
    )
    BertModel.from_pretrained(encoder).save_pretrained(tmp_path / "mute")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for words, message in (
        *(
            ([str(tmp_path / name)], f"an encoder of texts, got {str(tmp_path / name)!r} of type {name}")
            for name in ("vit", "clip", "t5")
        ),
        ([str(tmp_path / "mute"), "--length", "8"], "model must come with a tokenizer"),
        (of_encoder(encoder, f"--texts {tmp_path / 'empty.txt'}"), "texts must be a file with a text on each line"),
        (["--records", str(tmp_path / "other.json")], "records must be files of finetune_real.py, got "),
        ([], "either a model or --records must be given"),
    ):
        assert finetune_real.main(words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
        assert len(lines) == 1
        assert message in lines[0]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_real.main([str(tmp_path / "nowhere")]) == 2
    assert "model must be a local path or a Hub name" in capsys.readouterr().err
    assert finetune_real.main([str(tmp_path)]) == 2
    assert "model must be a model of texts, got" in capsys.readouterr().err


def test_the_learning_rate_rises_and_falls() -> None:
    assert [rate(step, 20) for step in (0, 1, 2, 19)] == pytest.approx([0.5, 1, 18 / 19, 1 / 19])
    assert rate(0, 1) == 1


def test_settings_measure_halves_of_the_way() -> None:
    assert Settings(steps=100).measured_at == [0, 6, 12, 25, 50, 100]
    assert Settings(steps=1).measured_at == [0, 1]


def test_the_page_shows_the_records() -> None:
    page = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECORDS} == {"minilm_22m", "gpt2_9m", "llama_260k", "llama_260k_all_layers"}
    for path, record in zip(RECORDS, read_records(RECORDS), strict=True):
        assert f"](../training/results/recovery/{path.name})" in page
        assert table(record) in page
        assert len(record["settings"]["seeds"]) == 3
        assert not record["git"]["dirty"]
