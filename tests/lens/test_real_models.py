"""What docs/lens.md says of real models is what its record holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.lens.real_models import BEGIN, END, PANELS, accuracy_of, main, put_into, rendered
from tests.helpers import ROOT

DOCS = ROOT / "docs"
RECORD: dict[str, Any] = json.loads((DOCS / "lens.json").read_text(encoding="utf-8"))
GPT2, MINILM, LLAMA, VIT = (
    RECORD[name]["layers"] for name in ("GPT-2 of microbes", "MiniLM", "Llama of stories", "ViT on CIFAR-10")
)


def gains(layers: list[dict[str, Any]], before: str, after: str) -> list[float]:
    return [layer["noise"][after] - layer["noise"][before] for layer in layers]


def test_table_is_that_of_the_record() -> None:
    page = (DOCS / "lens.md").read_text(encoding="utf-8")
    assert put_into(page, rendered(RECORD)) == page
    for panel in PANELS:
        assert f"(lens_{panel}.png)" in page
        assert (DOCS / f"lens_{panel}.png").stat().st_size > 10_000


def test_sentences_on_smoothing_and_noise_hold() -> None:
    for layers in (GPT2, MINILM, LLAMA):
        for layer in layers:
            assert layer["tokens"]["filtered"]["similarity"] > layer["tokens"]["values"]["similarity"]
    assert [len(layers) for layers in (GPT2, MINILM, LLAMA)] == [8, 6, 5]
    last = [layers[-1]["tokens"]["leaving"] for layers in (GPT2, MINILM, LLAMA)]
    assert [round(each["similarity"], 2) for each in last] == [0.79, 0.35, 0.21]
    assert [round(each["stable_rank"], 1) for each in last] == [1.4, 3.4, 4.0]
    lost = [sum(gain < 0 for gain in gains(layers, "values", "filtered")) for layers in (GPT2, MINILM, LLAMA)]
    assert lost == [7, 4, 5]
    residual = gains(MINILM, "entering", "after_residual")
    assert (round(min(residual), 1), round(max(residual), 1)) == (1.3, 1.7)
    promised = [layer["predicted_gain"] for layer in MINILM]
    assert (round(min(promised), 1), round(max(promised), 1)) == (0.9, 1.8)
    assert sum(gain > 0 for gain in gains(LLAMA, "entering", "after_residual")) == 4
    own = gains(GPT2, "entering", "after_residual")
    assert [index for index, gain in enumerate(own) if gain > 0] == [0, 1, 7]
    assert (round(own[0], 1), round(GPT2[0]["predicted_gain"], 1)) == (2.9, 29.6)


def test_sentences_on_kernels_and_sinks_hold() -> None:
    exact = GPT2[0]["exact_shares"]
    cross = exact["content-position"] + exact["position-content"]
    assert [round(100 * x) for x in (exact["content-content"], exact["position-position"], cross)] == [80, 3, 5]
    crosses = [
        [layer["shares"]["content-position"] + layer["shares"]["position-content"] for layer in layers]
        for layers in (GPT2, MINILM, LLAMA)
    ]
    assert round(100 * min(map(min, crosses))) == 2
    assert round(100 * max(map(max, crosses))) == 17
    most = [max(layer["shares"]["position-position"] for layer in layers) for layers in (LLAMA, MINILM)]
    assert [round(100 * x) for x in most] == [43, 51]
    for layers, ends in ((MINILM, (10, 39)), (GPT2, (18, 68))):
        rest = [layer["shares"]["residual"] for layer in layers]
        assert (round(100 * min(rest)), round(100 * max(rest))) == ends
    heads = RECORD["GPT-2 of microbes"]["heads"]
    assert (round(heads["sink_weight"][-1], 2), round(heads["sink_value_ratio"][-1], 2)) == (0.45, 0.05)
    assert max(RECORD["Llama of stories"]["heads"]["sink_weight"]) < 0.09
    radii = [[layer["radius"] for layer in layers] for layers in (GPT2, MINILM, LLAMA)]
    assert [(round(min(each), 2), round(max(each), 2)) for each in radii] == [(0.13, 0.81), (0.31, 0.56), (0.59, 0.89)]


def test_sentences_on_the_vit_hold() -> None:
    assert RECORD["ViT on CIFAR-10"]["eval_accuracy"] == 0.4724
    alike = [[layer["tokens"][place]["similarity"] for place in ("values", "filtered")] for layer in VIT]
    assert [after > before for before, after in alike] == [True, False, True, True, True, True]
    assert [round(value, 3) for value in alike[1]] == [0.751, 0.749]
    first, last = VIT[0]["tokens"]["entering"], VIT[-1]["tokens"]["leaving"]
    assert [round(x, 2) for x in (first["similarity"], last["similarity"])] == [0.54, 0.86]
    assert round(last["stable_rank"], 1) == 1.1
    own = [round(gain, 1) for gain in gains(VIT, "values", "filtered")]
    assert own[0] == 3.2
    assert (max(own[1:]), min(own[1:])) == (-1.2, -5.7)
    kernel = [round(100 * layer["shares"]["position kernel"]) for layer in VIT]
    assert (kernel[0], min(kernel[1:]), max(kernel[1:])) == (76, 92, 99)
    assert sum(round(layer["largest_radius"], 1) == 1 and layer["largest_operator_radius"] > 2.9 for layer in VIT) == 4


def test_page_without_marks_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="must have the marks"):
        put_into(BEGIN, "table")
    assert put_into(f"a {BEGIN} b {END} c", "d") == f"a {BEGIN}\n\nd\n\n{END} c"
    (tmp_path / "lens.md").write_text("nothing", encoding="utf-8")
    assert main(["--docs", str(tmp_path)]) == 2
    assert "must have the marks" in capsys.readouterr().err
    assert main(["--docs", str(tmp_path / "new")]) == 2


@pytest.mark.parametrize("model", ["name", "=folder", "name=", "name=folder,pictures"])
def test_further_models_have_a_name_and_a_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lens.md").write_text(f"{BEGIN}{END}", encoding="utf-8")
    assert main(["--docs", str(tmp_path), "--model", model]) == 2
    assert "model must be NAME=FOLDER or NAME=FOLDER,DATA" in capsys.readouterr().err


def test_accuracy_is_the_last_one_of_the_run(tmp_path: Path) -> None:
    assert accuracy_of(str(tmp_path)) is None
    log = [{"eval_accuracy": 0.25}, {"loss": 1.0}, {"eval_accuracy": 0.5}, {"train_loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
    assert accuracy_of(str(tmp_path)) == 0.5
