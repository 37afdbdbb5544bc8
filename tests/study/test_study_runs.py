"""Studies from end to end, with tiny models: pairs, results, what goes on after a stop, what goes wrong."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import PRESETS
from hf_imgproc_attn.records import write_json
from hf_imgproc_attn.study import driver
from hf_imgproc_attn.study import run as one_run
from hf_imgproc_attn.study.driver import InThisProcess, prepare, run_study
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.plan import Study, training_script
from hf_imgproc_attn.study.report import cells, write_report
from hf_imgproc_attn.study.study_file import read_study
from hf_imgproc_attn.study.table import build_tables
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_start import new_model
from hf_imgproc_attn.training_support.trainer import ScriptTrainer
from tests.study.conftest import TINY_TASK, WriteStudy

_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {
    "image-classification": {**_ENCODER, "image_size": 8, "patch_size": 2},
    "causal-lm": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16},
    "text-classification": {**_ENCODER, "vocab_size": 64},
}


def do(study: Study, folder: Path, **options: Any) -> list[str]:
    """Run a study in this process and return what it says."""
    said: list[str] = []
    ledger = Ledger(folder)
    run_study(study, ledger, InThisProcess(study, ledger), say=said.append, **options)
    return said


def with_options(**changes: Any) -> dict[str, Any]:
    return {"digits": {**TINY_TASK, "options": {**TINY_TASK["options"], **changes}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The YAML file and the ledger of a finished study with a matched baseline and measurements."""
    import yaml

    from tests.study.conftest import tiny_study

    folder = tmp_path_factory.mktemp("study")
    matched = [{"name": "as_large", "like": "bilateral", "in": "parameters"}]
    tasks = {"digits": {**TINY_TASK, "measure": {"sigmas": [0.1], "attacks": ["fgsm", "pgd"], "epsilons": ["8/255"]}}}
    content = tiny_study(variants=["softmax", "bilateral"], matched=matched, tasks=tasks, keep_models=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    do(read_study(path), folder / "ledger")
    return path, folder / "ledger"


@pytest.mark.parametrize("task", SIZES)
def test_variants_of_one_seed_start_from_one_model(task: str) -> None:
    """Every parameter that a variant shares with softmax has its start, and the random numbers go on alike."""
    from hf_imgproc_attn.backbones import OF_TASK

    def start(preset: str, seed: int = 5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(seed)
        model = new_model(task, ModelArguments(preset=preset, paired_start=True), SIZES[task])
        return model.state_dict(), torch.rand(3)

    stock, then = start("softmax")
    own = {}
    for preset in [name for name in PRESETS if name not in OF_TASK[task].refused_presets]:
        values, further = start(preset)
        assert torch.equal(further, then), preset
        shared = [name for name in values if name in stock and values[name].shape == stock[name].shape]
        assert len(shared) >= len(stock) - 4, preset  # the position table of the tokens may be missing
        for name in shared:
            assert torch.equal(values[name], stock[name]), (preset, name)
        own[preset] = {name: value for name, value in values.items() if name not in stock}
    for name, value in own["bilateral"].items():
        assert torch.equal(value, own["bilateral_twicing"][name])
    other, _ = start("softmax", seed=6)
    assert any(not torch.equal(other[name], value) for name, value in stock.items())


def test_variants_of_one_seed_see_the_same_batches(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = ScriptTrainer.compute_loss

    def compute_loss(self: ScriptTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append(inputs["pixel_values"].clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ScriptTrainer, "compute_loss", compute_loss)
    study = read_study(write_study(tasks=with_options(max_steps=6)))  # beyond the end of an epoch
    batches = {}
    for run in study.runs:
        seen.clear()
        script = training_script(run.task.kind)
        script.train(script.read_arguments(one_run.words(study, run, tmp_path / run.name)))
        batches[run.variant.name, run.seed] = torch.stack(seen)
    for seed in study.seeds:
        assert torch.equal(batches["softmax", seed], batches["twicing", seed])
    assert not torch.equal(batches["softmax", 0], batches["softmax", 1])
    assert not torch.equal(batches["softmax", 0][:3], batches["softmax", 0][3:])


def test_a_run_does_not_depend_on_those_before_it(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = finished
    study = read_study(path)
    last = [run for run in study.runs if run.variant.name == "bilateral"][-1]
    _, sizes, _ = prepare(study, lambda line: None)
    alone = one_run.carry_out(study, last, tmp_path / "alone", sizes["digits"]["bilateral"])
    before = Ledger(folder).read(last)
    assert before is not None
    for record in (alone, before):
        record["metrics"].pop("train")  # has times
    for name in ("weights_sha256", "metrics", "measurements"):
        assert alone[name] == before[name]


def test_a_record_says_what_was_run_and_on_what(finished: tuple[Path, Path]) -> None:
    path, folder = finished
    ledger = Ledger(folder)
    records = ledger.everything(read_study(path))
    assert len(records) == 6
    for record in records.values():
        assert record["status"] == "finished"
        assert record["steps"] == 3
        assert set(record["metrics"]) == {"train", "validation", "test"}
        assert {"torch", "transformers", "python", "hf_imgproc_attn"} <= set(record["versions"])
        assert record["device"]["type"] == "cpu"
        assert record["data_fingerprint"]["test"]["rows"] == 32
        assert record["operations"]["training"] == record["operations"]["step_per_sample"] * 3 * 16
        assert record["seconds"]["training"] > 0
        measured = [result["disturbance"] for result in record["measurements"]]
        assert measured[:4] == ["clean", "Gaussian noise", "FGSM", "PGD"]
        accuracies = [result["value"] for result in record["measurements"]]
        assert accuracies[0] == pytest.approx(record["metrics"]["test"]["accuracy"])
        assert "git" in record
        assert str(folder) not in json.dumps(record)
    assert sorted(path.name for path in ledger.models.iterdir()) == sorted(records)
    assert [path for path in ledger.running.iterdir() if path.is_dir()] == []


def test_a_matched_baseline_has_at_least_as_much_and_no_more_than_needed(finished: tuple[Path, Path]) -> None:
    path, folder = finished
    study = read_study(path)
    said: list[str] = []
    with_baselines, sizes, _ = prepare(study, said.append)
    size = sizes["digits"]
    assert size["as_large"].parameters >= size["bilateral"].parameters
    run = next(run for run in with_baselines.runs if run.variant.name == "as_large")
    assert run.variant.preset == "softmax"
    assert run.variant.fields["num_hidden_layers" if "num_hidden_layers" in run.variant.fields else "hidden_size"] > 2
    records = Ledger(folder).everything(study)
    assert records[run.name]["parameters"]["total"] == size["as_large"].parameters
    assert records["digits-bilateral-seed0"]["parameters"]["total"] == size["bilateral"].parameters
    assert f"{size['as_large'].parameters:,}" in "\n".join(said)


def test_every_variant_is_counted_by_the_dense_formulas(finished: tuple[Path, Path]) -> None:
    """In a layer of N tokens and width D twicing adds one product A V: forward 2 N^2 D, backward twice that."""
    from dataclasses import replace

    from hf_imgproc_attn.study.plan import Variant

    study = read_study(finished[0])
    variants = (Variant("softmax", "softmax"), Variant("twicing", "twicing"), Variant("bilateral", "bilateral"))
    _, sizes, _ = prepare(replace(study, variants=variants), lambda line: None)
    length, width, layers = 17, 16, 2
    difference = sizes["digits"]["twicing"].compute - sizes["digits"]["softmax"].compute
    assert difference == layers * 3 * 2 * length**2 * width
    assert sizes["digits"]["bilateral"].compute > sizes["digits"]["twicing"].compute


def test_the_report_is_made_of_the_ledger_alone(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = finished
    monkeypatch.setattr(driver, "Prepared", None)  # no data are loaded, no model is made
    for name in ("md", "tex", "json", "png"):
        (folder / f"report.{name}").unlink(missing_ok=True)
    assert main(["study", str(path), "--ledger", str(folder), "--report"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    conditions = [table["condition"] for table in content["tables"]]
    attacks = [f"{name}, epsilon 8/255" for name in ("FGSM", "PGD", "worst case")]
    assert conditions == ["clean", "Gaussian noise, sigma 0.1", *attacks]
    for kind in ("md", "tex"):
        text = (folder / f"report.{kind}").read_text(encoding="utf-8")
        assert all(name.replace("_", "\\_" if kind == "tex" else "_") in text for name in ("as_large", "bilateral"))
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["variant"]: row for row in content["tables"][0]["rows"]}
    records = Ledger(folder).everything(read_study(path))
    for variant in ("softmax", "bilateral", "as_large"):
        values = [records[f"digits-{variant}-seed{seed}"]["metrics"]["test"]["accuracy"] for seed in (0, 1)]
        assert rows[variant]["summary"]["mean"] == pytest.approx(np.mean(values))
        assert f"{100 * np.mean(values):.2f}" in printed
    assert rows["softmax"]["difference"] is None
    assert "(0 comparisons)" in printed  # of two seeds: too few for a verdict


def test_a_finished_study_does_nothing_more_and_can_grow(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    import yaml

    path, folder = finished
    copy = shutil.copytree(folder, tmp_path / "ledger")
    before = {file.name: file.stat().st_mtime_ns for file in copy.glob("*-seed*.json")}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["variants"].append("neutreno")
    content["tasks"]["digits"]["measure"] = {"sigmas": [0.1, 0.2]}
    grown = tmp_path / "grown.yaml"
    grown.write_text(yaml.safe_dump(content), encoding="utf-8")
    counted = json.loads((copy / "digits-softmax-seed0.json").read_text(encoding="utf-8"))
    otherwise = {"step_per_sample": 10, "training": 480}  # by another version of the package
    write_json(copy / "digits-softmax-seed0.json", {**counted, "operations": otherwise})
    trained: list[str] = []
    original = one_run._train

    def train(study: Study, run: Any, folder: Path) -> dict[str, Any]:
        trained.append(run.name)
        return original(study, run, folder)

    monkeypatch.setattr(one_run, "_train", train)
    do(read_study(path), copy)
    assert trained == []
    now = {file.name: file.stat().st_mtime_ns for file in copy.glob("*-seed*.json")}
    assert {name for name in before if now[name] != before[name]} == {"digits-softmax-seed0.json"}
    assert json.loads((copy / "digits-softmax-seed0.json").read_text(encoding="utf-8")) == counted
    do(read_study(grown), copy)
    assert trained == ["digits-neutreno-seed0", "digits-neutreno-seed1"]
    # What is to be measured now was measured of the checkpoints that were kept.
    for record in Ledger(copy).everything(read_study(grown)).values():
        assert [result["parameters"] for result in record["measurements"]] == [{}, {"sigma": 0.1}, {"sigma": 0.2}]


def test_shards_do_every_run_once(write_study: WriteStudy, tmp_path: Path) -> None:
    study = read_study(write_study(variants=["softmax", "twicing", "sos"], seeds=1))
    for index in (1, 2):
        do(study, tmp_path / "ledger", shard=(index, 2))
        assert len(Ledger(tmp_path / "ledger").names()) == (2, 3)[index - 1]


def test_the_budget_begins_nothing_that_would_not_end(write_study: WriteStudy, tmp_path: Path) -> None:
    study, folder = read_study(write_study()), tmp_path / "ledger"
    assert "the budget of 1e-06 minutes is used: 4 runs are left" in do(study, folder, budget_minutes=1e-6)[-1]
    said = do(study, folder, budget_minutes=60)
    assert any(line.startswith("4/4 digits-twicing-seed1: test accuracy") for line in said)
    assert any("2 left, about" in line for line in said)
    assert "none left" in said[-1]


def test_a_study_of_the_validation_split_does_not_read_the_test_split(write_study: WriteStudy, tmp_path: Path) -> None:
    task = {**TINY_TASK, "measure": {"sigmas": [0.1]}}
    study = read_study(write_study(split="validation", seeds=1, variants=["softmax"], tasks={"digits": task}))
    do(study, tmp_path / "ledger")
    (record,) = Ledger(tmp_path / "ledger").everything(study).values()
    assert set(record["metrics"]) == {"train", "validation"}
    assert {result["split"] for result in record["measurements"]} == {"validation"}
    assert [table.split for table in build_tables(study, {"": record})] == ["validation", "validation"]


def test_a_diverged_run_is_marked_counted_and_stopped(write_study: WriteStudy, tmp_path: Path) -> None:
    wild = {"name": "wild", "preset": "softmax", "fields": {"initializer_range": 1e30}}
    tasks = {"digits": {**with_options(max_steps=50, logging_steps=1)["digits"], "measure": {"sigmas": [0.1]}}}
    study = read_study(write_study(variants=["softmax", wild], seeds=2, tasks=tasks))
    folder = tmp_path / "ledger"
    said = do(study, folder)
    assert any("wild-seed0: diverged" in line for line in said)
    record = json.loads((folder / "digits-wild-seed0.json").read_text(encoding="utf-8"))
    assert (record["status"], record["measurements"]) == ("diverged", [])
    assert record["steps"] < 50
    json.loads((folder / "digits-wild-seed0.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    tables = write_report(study, Ledger(folder), say=lambda line: None)
    stock, other = tables[0].rows
    assert (stock.diverged, other.diverged, other.summary, other.verdict) == (0, 2, None, "2 diverged")
    assert "2 of them diverged" in (folder / "report.md").read_text(encoding="utf-8")


def test_when_all_have_diverged_the_command_says_so(
    write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"name": "wild", "preset": "softmax", "fields": {"initializer_range": 1e30}}
    path = write_study(variants=[wild], baseline="wild", seeds=1, tasks=with_options(logging_steps=1))
    do(read_study(path), tmp_path / "ledger")
    capsys.readouterr()
    assert main(["study", str(path), "--ledger", str(tmp_path / "ledger"), "--report"]) == 0
    said = "all 1 runs that have ended have diverged: there is nothing to compare"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "ledger" / "report.md").read_text(encoding="utf-8")


def test_a_mistake_that_training_finds_names_the_task_and_binds_nothing(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    folder = tmp_path / "ledger"
    with pytest.raises(UsageError, match="task digits: argument --lr_scheduler_type.*invalid choice: 'wavy'"):
        do(read_study(write_study(tasks=with_options(lr_scheduler_type="wavy"))), folder)
    assert not folder.exists()


def test_a_variants_own_training_is_checked_before_any_run(write_study: WriteStudy, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    odd = {"name": "odd", "preset": "twicing", "options": {"optim": "none_such"}}
    with pytest.raises(UsageError, match="task digits, variant odd: argument --optim.*invalid choice: 'none_such'"):
        do(read_study(write_study(variants=["softmax", odd])), folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "more", [{"fields": {"hidden_size": 16}}, {"fields": {"boosting": "none"}}, {"options": {"learning_rate": "1e-3"}}]
)
def test_one_model_under_two_names_is_refused(write_study: WriteStudy, tmp_path: Path, more: dict[str, Any]) -> None:
    twin = {"name": "twin", "preset": "softmax", **more}
    with pytest.raises(UsageError, match="softmax and twin have the same configuration: their runs would be equal"):
        do(read_study(write_study(variants=["softmax", twin])), tmp_path / "ledger")


def test_a_matched_baseline_that_is_the_baseline_is_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    matched = [{"name": "as_large", "like": "twicing", "in": "parameters"}]  # twicing has no parameters
    with pytest.raises(UsageError, match="softmax and as_large have the same configuration"):
        do(read_study(write_study(matched=matched)), tmp_path / "ledger")


def test_a_variant_without_the_baselines_seeds_is_no_baseline(finished: tuple[Path, Path]) -> None:
    study = read_study(finished[0])
    records = Ledger(finished[1]).everything(study)
    left = {name: record for name, record in records.items() if record["variant"] == "bilateral"}
    rows = {row.variant: row for row in build_tables(study, left)[0].rows}
    assert (rows["softmax"].verdict, rows["bilateral"].verdict) == ("", "no pair")
    assert cells(rows["bilateral"], "accuracy")[8] == "no pair"


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = write_study(seeds=1), tmp_path / "ledger"
    trained: list[str] = []
    original, full = one_run._train, [True]

    def train(study: Study, run: Any, work: Path) -> dict[str, Any]:
        record = original(study, run, work)
        trained.append(f"{run.name} {record['training_seconds']}")
        return record

    def write(place: Path, content: dict[str, Any]) -> Path:
        if full[0] and "seed" in place.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        return write_json(place, content)

    monkeypatch.setattr(one_run, "_train", train)
    monkeypatch.setattr("hf_imgproc_attn.study.ledger.write_json", write)
    words = ["study", str(path), "--ledger", str(folder)]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "No space left on device" in line]
    full[0] = False
    assert main(words) == 0
    assert trained[0] == trained[1]  # the training itself was not lost
    assert len(Ledger(folder).names()) == 2


def test_other_data_than_the_ledgers_are_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    path, folder = write_study(), tmp_path / "ledger"
    study = read_study(path)
    do(study, folder, shard=(1, 4))
    name = study.runs[0].name
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    record["data_fingerprint"]["train"]["sha256"] = "other"
    write_json(folder / f"{name}.json", record)
    with pytest.raises(UsageError, match=f"the train split must be the one that run {name} was made with"):
        do(study, folder)


def test_a_variant_that_no_model_can_have_is_refused_before_anything_is_trained(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    wrong = {"name": "wrong", "preset": "twicing", "fields": {"boosted_layers": [7]}}
    study = read_study(write_study(variants=["softmax", wrong]))
    with pytest.raises(UsageError, match="task digits, variant wrong: .*boosted_layers"):
        do(study, tmp_path / "ledger")
    assert Ledger(tmp_path / "ledger").names() == []


def test_texts_are_studied_alike(write_study: WriteStudy, tmp_path: Path) -> None:
    task = {
        "task": "causal-lm",
        "options": {
            "max_steps": 2, "per_device_train_batch_size": 4, "max_train_samples": 400, "max_eval_samples": 60,
            "tokenizer_vocab_size": 300, "block_size": 32, "use_cpu": True,
            "config_overrides": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        },
        "measure": {"fractions": [0.02, 0.05]},
    }  # fmt: skip
    matched = [{"name": "as_costly", "like": "twicing", "in": "compute"}]
    study = read_study(write_study(tasks={"manual": task}, seeds=1, matched=matched))
    do(study, tmp_path / "ledger")
    tables = write_report(study, Ledger(tmp_path / "ledger"), say=lambda line: None)
    assert [(table.condition, table.metric) for table in tables] == [
        ("clean", "word_perplexity"),
        ("word swap, fraction 0.02", "word_perplexity"),
        ("word swap, fraction 0.05", "word_perplexity"),
    ]
    assert [row.variant for row in tables[0].rows] == ["softmax", "as_costly", "twicing"]
    assert all(row.summary is not None and math.isfinite(row.summary.mean) for row in tables[0].rows)


def test_masks_and_sequences_are_studied_alike(write_study: WriteStudy, tmp_path: Path) -> None:
    few = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_train_samples": 8,
        "max_eval_samples": 4,
        "use_cpu": True,
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    listops = {"min_length": 4, "max_length": 24, "max_depth": 3, "max_args": 3}
    tasks = {
        "composed": {
            "task": "semantic-segmentation",
            "options": {**few, "pictures": 0, "config_overrides": sizes},
            "measure": {"sigmas": [0.1], "epsilons": ["4/255"]},
        },
        "listops": {
            "task": "sequence-classification",
            "options": {
                **few,
                "dataset_name": "listops_short",
                "sequence_settings": [f"{name}={value}" for name, value in listops.items()],
                "config_overrides": {**sizes, "classifier_pooling": "mean"},
            },
        },
    }
    study = read_study(write_study(tasks=tasks, variants=["bilateral"], baseline="bilateral", seeds=1))
    said = do(study, tmp_path / "ledger")
    assert any("composed-bilateral-seed0: test mean iou" in line for line in said)
    assert any("listops-bilateral-seed0: test accuracy" in line for line in said)
    tables = build_tables(study, Ledger(tmp_path / "ledger").everything(study))
    shown = {(table.task, table.condition, table.metric) for table in tables}
    assert {("composed", "clean", "mean_iou"), ("listops", "clean", "accuracy")} <= shown
    for condition in ("Gaussian noise, sigma 0.1", "FGSM, epsilon 4/255"):
        assert ("composed", condition, "mean_iou") in shown
    assert all(row.summary is not None and 0 <= row.summary.mean <= 1 for table in tables for row in table.rows)
