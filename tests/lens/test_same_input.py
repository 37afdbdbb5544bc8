"""A comparison: each checkpoint has its own name, and all see the same input, or the report says that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_imgproc_attn import ImgProcViTForImageClassification
from hf_imgproc_attn.cli import main
from hf_imgproc_attn.lens.compare import own_names
from hf_imgproc_attn.lens.inputs import load_model
from hf_imgproc_attn.lens.same_input import Asked, Seen, common_length, shown_to
from tests.any_model.architectures import build
from tests.models.helpers import tiny_vit_config

WORDS = ("the", "cat", "sat", "on", "mat", "a", "dog", "ran")


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        (["a/gpt2"], ["a/gpt2"]),
        (["runs/one/best", "runs/two/best"], ["one/best", "two/best"]),
        (["one/x/best", "two/x/best"], ["one/x/best", "two/x/best"]),
        (["/a/b/best", "/c/b/best", "/c/b/last"], ["a/b/best", "c/b/best", "last"]),
        (["/b/best", "best"], ["b/best", "best"]),
        (["/b/Best", "/c/best"], ["b/Best", "c/best"]),
        (["/best", "best"], ["/best", "best"]),
    ],
)
def test_names_are_as_long_as_it_takes_to_tell_them_apart(checkpoints: list[str], names: list[str]) -> None:
    assert own_names(checkpoints) == names


def test_checkpoints_with_the_same_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its name, its pictures and its panels."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("one", "two")):
        build("llama", seed=number, num_hidden_layers=1).float().save_pretrained(Path("runs") / name / "best")
    arguments = ["--data", "random", "--length", "6", "--samples", "2", "--output", "new"]
    assert main(["lens", "runs/one/best", "./runs/two/best/", *arguments]) == 0
    held = json.loads(Path("new/lens.json").read_text(encoding="utf-8"))
    assert [each["model"] for each in held] == ["one/best", "two/best"]
    pictures = {path.name: path.read_bytes() for path in Path("new").glob("maps*.png")}
    assert sorted(pictures) == ["maps_one_best_layer_0.png", "maps_two_best_layer_0.png"]
    assert len(set(pictures.values())) == 2
    page = Path("new/lens.html").read_text(encoding="utf-8")
    assert page.count("one/best layer 0</figcaption>") == page.count("two/best layer 0</figcaption>") == 2


@pytest.mark.parametrize("again", ["m/gpt2/", "./m/gpt2", "m/../m/gpt2", "link"])
def test_a_checkpoint_named_twice_is_refused(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m/gpt2").mkdir(parents=True)
    Path("link").symlink_to("m/gpt2")
    for first, second in (("m/gpt2", again), ("owner/name", "owner/name/")):
        with pytest.raises(SystemExit):
            main(["lens", first, second])
        assert f"MODEL must name each checkpoint once, got {first!r} and {second!r}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# What they see
# --------------------------------------------------------------------------------------------------------------------


def _texts(folder: Path, words: tuple[str, ...] | None, **changes: Any) -> str:
    """A model of texts, with a tokenizer of these words where there are any."""
    build("llama", num_hidden_layers=1, **changes).float().save_pretrained(folder)
    if words is not None:
        numbers = {word: number for number, word in enumerate(("[UNK]", *words))}
        tokenizer = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def _seen(checkpoints: list[str], asked: Asked = Asked(samples=2, length=8)) -> list[Seen]:  # noqa: B008
    seen: list[Seen] = []
    for name in checkpoints:
        shown_to(load_model(name), name, Path(name).name, asked, seen)
    return seen


def test_a_tokenizer_that_is_missing_in_one_is_taken_from_the_other(tmp_path: Path) -> None:
    first, second = _texts(tmp_path / "words", WORDS), _texts(tmp_path / "bare", None)
    one, two = _seen([first, second])
    assert one.shown.described == two.shown.described == "the manual inside Python"
    assert torch.equal(one.shown.inputs["input_ids"], two.shown.inputs["input_ids"])
    assert one.shown.labels == two.shown.labels
    assert one.shown.notes == ()
    assert two.shown.notes == ("bare has no tokenizer: its 50 tokens are taken for those of the other",)


@pytest.mark.parametrize(
    ("words", "changes", "note"),
    [
        (WORDS[::-1], {}, "not the input of first: it has other tokens, and cuts texts in its own way"),
        (None, {"vocab_size": 40}, "not the input of first: it has other tokens (40, not 50)"),
        (WORDS, {"vocab_size": 6}, "not the input of first: it has vectors for 6 tokens only"),
    ],
)
def test_other_tokens_are_said(
    words: tuple[str, ...] | None, changes: dict[str, Any], note: str, tmp_path: Path
) -> None:
    first = _texts(tmp_path / "first", WORDS)
    second = _texts(tmp_path / "second", words, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)
    data = "random" if "vectors" in note else "auto"  # its own tokenizer has more words than it has vectors
    one, two = _seen([first, second], Asked(data=data, samples=2, length=8))
    assert two.shown.notes == (note,)
    assert one.shown.notes == ()
    assert not torch.equal(one.shown.inputs["input_ids"], two.shown.inputs["input_ids"])


def test_a_third_checkpoint_sees_what_the_second_did(tmp_path: Path) -> None:
    names = [
        _texts(tmp_path / "first", WORDS),
        *(_texts(tmp_path / name, None, vocab_size=40, pad_token_id=0) for name in ("b", "c")),
    ]
    _, two, three = _seen(names)
    assert two.shown.described == three.shown.described == "texts that b wrote"
    assert torch.equal(two.shown.inputs["input_ids"], three.shown.inputs["input_ids"])
    assert len(two.shown.notes) == len(three.shown.notes) == 1


def test_length_is_that_of_the_shortest(checkpoints: Path, tmp_path: Path) -> None:
    short = _texts(tmp_path / "short", None, max_position_embeddings=9)
    names = [str(checkpoints / "llama"), short, str(checkpoints / "vit")]
    assert common_length(names, None) == 9
    assert common_length(names, 5) == 5
    assert common_length(names[:1], None) == 64
    with pytest.raises(ValueError, match="length must be at most 9, the places of .*short', got 10"):
        common_length(names, 10)


def test_images_of_other_sizes_are_said(checkpoints: Path, tmp_path: Path) -> None:
    config = tiny_vit_config("softmax", num_channels=1, num_hidden_layers=1, image_size=16, patch_size=4)
    ImgProcViTForImageClassification(config).save_pretrained(tmp_path / "small")
    names = [str(checkpoints / "vit"), str(tmp_path / "small"), str(checkpoints / "llama")]
    _, small, texts = _seen(names)
    sizes = "16 x 16 pixels of 1 channel instead of 20 x 12 pixels of 1 channel"
    assert small.shown.notes == (f"not the input of vit: the same pictures, in {sizes}",)
    assert texts.shown.notes == ("not the input of vit: one takes texts, the other images",)
    random = _seen(names[:2], Asked(data="random", samples=2))[1]
    assert random.shown.notes == (f"not the input of vit: other ones, in {sizes}",)


def test_notes_stand_in_every_form_of_the_report(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _texts(tmp_path / "other", None, vocab_size=40, pad_token_id=0)
    arguments = ["--data", "random", "--samples", "2", "--length", "6", "--spectra", "none", "--noise", "0"]
    assert main(["lens", str(checkpoints / "llama"), other, *arguments, "--output", str(tmp_path / "new")]) == 0
    note = "not the input of llama: it has other tokens (40, not 50)"
    assert f"note: {note}" in capsys.readouterr().out
    assert f"other: {note}" in (tmp_path / "new" / "lens.html").read_text(encoding="utf-8")
    assert note in (tmp_path / "new" / "lens.md").read_text(encoding="utf-8")
    held = json.loads((tmp_path / "new" / "lens.json").read_text(encoding="utf-8"))
    assert [each["notes"] for each in held] == [[], [note]]
