"""``--lens_every``: what the attention filters, in the log of a training run, its record and its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_imgproc_attn.cards.filters import check_lens, lens_history, lens_in_markdown
from hf_imgproc_attn.errors import UsageError

TINY = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The records of the same run with and without the lens."""
    import train_image_classification

    records = {}
    for name, more in (("plain", []), ("looked", ["--lens_every", "2"])):
        folder = tmp_path_factory.mktemp("runs") / name
        words = "--preset bilateral_gaussian --max_steps 4 --use_cpu --disable_tqdm true --save_strategy no"
        options = [*words.split(), "--eval_strategy", "no", "--max_eval_samples", "20", "--max_train_samples", "64"]
        options += ["--random_crop_padding", "1", "--config_overrides", *TINY, "--output_dir", str(folder), *more]
        assert train_image_classification.main(options) == 0
        records[name] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        records[name]["log"] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return records


def test_measures_are_logged_and_recorded(histories: dict[str, dict]) -> None:
    history = histories["looked"]["lens_history"]
    assert [step for step, _ in history] == [0, 2, 4]
    for _, seen in history:
        assert set(seen) == {"entropy_share", "position_bandwidth", "content_bandwidth", "sink_weight", "similarity"}
        assert all(len(layers) == 2 for layers in seen.values())
        assert all(0 < value <= 1 for value in seen["entropy_share"])
    assert history[0][1] != history[2][1]
    assert any("lens_similarity_1" in entry for entry in histories["looked"]["log"])
    assert "lens_history" not in histories["plain"]


def test_looking_changes_nothing(histories: dict[str, dict]) -> None:
    assert histories["looked"]["train_loss"] == histories["plain"]["train_loss"]
    assert histories["looked"]["weights_sha256"] == histories["plain"]["weights_sha256"]


def test_card_shows_the_first_and_the_last_look() -> None:
    log = [
        {"step": 0, "lens_similarity_0": 0.25, "lens_similarity_1": 0.5, "lens_entropy_share_0": 1.0},
        {"step": 1, "loss": 2.0},
        {"step": 7, "lens_similarity_1": 0.75, "lens_similarity_0": 0.3, "lens_entropy_share_0": 0.9},
    ]
    history = lens_history(log)
    assert history == [
        [0, {"similarity": [0.25, 0.5], "entropy_share": [1.0]}],
        [7, {"similarity": [0.3, 0.75], "entropy_share": [0.9]}],
    ]
    check_lens(history)
    text = lens_in_markdown(history)
    assert "before training → after 7 steps" in text
    assert "| 1 | - → - | 0.5 → 0.75 |" in text


def test_records_of_another_form_are_refused() -> None:
    for history in ([3], [[1, {"similarity": ["high"]}]], [[1]]):
        with pytest.raises(UsageError, match="lens_history must hold a step"):
            check_lens(history)


def test_every_is_a_positive_integer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import train_image_classification

    assert train_image_classification.main(["--lens_every", "0", "--output_dir", str(tmp_path / "run")]) == 2
    assert "lens_every must be an integer >= 1, got 0" in capsys.readouterr().err
