"""The YAML file of a study: what it means, and one line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.study.driver import parse_shard
from hf_imgproc_attn.study.report import of_their_own
from hf_imgproc_attn.study.study_file import read_study
from tests.helpers import ROOT
from tests.study.conftest import TINY_TASK, WriteStudy

STUDIES = sorted((ROOT / "training" / "configs" / "studies").glob("*.yaml"))


def with_task(**changes: Any) -> dict[str, Any]:
    return {"tasks": {"digits": {**TINY_TASK, **changes}}}


def with_options(**changes: Any) -> dict[str, Any]:
    return with_task(options={**TINY_TASK["options"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["softmax", "twicng"]}, "preset must be one of .* got 'twicng'; did you mean twicing?"),
        ({"variants": []}, "variants must be a list that is not empty, got \\[\\]"),
        ({"variants": "softmax"}, "variants must be a list"),
        ({"variants": ["softmax", "softmax"]}, "variants must have different names, got 'softmax' twice"),
        (
            {"variants": ["softmax", {"name": "stock", "preset": "softmax"}]},
            "variants 'softmax' and 'stock' are equal",
        ),
        ({"variants": ["softmax", {"preset": "twicing", "field": {}}]}, "unknown field of a variant 'field'.*fields?"),
        ({"variants": ["softmax", 3]}, "must be the name of a preset or a mapping, got 3"),
        ({"variants": ["softmax", {"preset": "twicing", "fields": {"bosting_steps": 3}}]}, "bosting_steps"),
        (
            {"variants": ["softmax", {"name": "a", "preset": "twicing", "options": {"learnin_rate": 1}}]},
            "unknown option of variant a 'learnin_rate': it must be one of learning_rate, .*did you mean",
        ),
        (
            {"variants": ["softmax", {"name": "a", "preset": "twicing", "options": {"dataset_name": "b"}}]},
            "unknown option of variant a 'dataset_name'",
        ),
        (
            {"variants": ["softmax", {"name": "a", "preset": "twicing", "options": ["max_steps"]}]},
            "options of variant a must be a mapping, got \\['max_steps'\\]",
        ),
        (
            {"variants": ["softmax", {"name": "a", "preset": "twicing", "options": {"max_steps": "many"}}]},
            "task digits, variant a: .*max_steps.*'many'",
        ),
        ({"variants": ["twicing"]}, "baseline must be one of the variants \\(twicing\\), got 'softmax'"),
        ({"seeds": []}, "seeds must be a number of seeds from 1 to 10,000 or a list"),
        ({"seeds": 0}, "seeds must be .* got 0"),
        ({"seeds": [1, 1]}, "two runs would be equal"),
        ({"seeds": [0, -1]}, "seeds must be"),
        ({"seeds": "left out"}, "seeds must be given"),
        ({"seed": 3}, "unknown field 'seed'.*did you mean seeds?"),
        ({"version": "new"}, "version must be an integer >= 1, got 'new'"),
        ({"name": "a b"}, "name must consist of letters, digits and _, got 'a b'"),
        ({"seeds": 10**30}, "seeds must be a number of seeds from 1 to 10,000 .*got 10{30}"),
        ({"variants": [{"name": "a", "preset": []}]}, "preset of variant a must be one of .* got \\[\\]"),
        (
            {"variants": ["softmax", {"name": "a", "fields": {"boosting": "sos"}}]},
            "preset of variant a must be given: softmax for stock attention with the variant's own fields",
        ),
        ({"matched": 0}, "matched must be a list, got 0"),
        (with_task(task={"image": 1}), "task of digits must be one of .* got {'image': 1}"),
        (with_task(options=False), "options of task digits must be a mapping, got False"),
        (with_task(measure=[]), "measure of task digits must be a mapping, got \\[\\]"),
        (with_task(measure={"corruptions": "fog"}), "corruptions of task digits must be a list, got 'fog'"),
        (with_options(config_overrides=""), "config_overrides of task digits must be a mapping, got ''"),
        (with_options(learning_rate=[1, 2]), "argument --learning_rate: expected one value, got 1 2"),
        (with_options(bf16="maybe"), "argument --bf16: must be true or false, got 'maybe'"),
        (
            {"tasks": {"one": TINY_TASK, "two": with_options(max_steps="3")["tasks"]["digits"]}},
            "tasks one and two are equal",
        ),
        (
            {"tasks": {"one": TINY_TASK, "two": with_options(learning_rate="1e-3")["tasks"]["digits"]}},
            "tasks one and two are equal",
        ),
        ({"split": "train"}, "split must be one of test, validation, got 'train'"),
        ({"keep_models": 1}, "keep_models must be true or false, got 1"),
        ({"tasks": {}}, "tasks must be a mapping that is not empty"),
        ({"tasks": {"one": TINY_TASK, "two": TINY_TASK}}, "tasks one and two are equal"),
        (with_task(task="image-clasification"), "task of digits must be one of .* got 'image-clasification'"),
        (with_task(recipe="none.yaml"), "recipe of task digits must be a file .* got 'none.yaml'"),
        (with_task(measures={}), "unknown field of task digits 'measures'.*did you mean measure?"),
        (with_options(learning_rte=1), "task digits, variant softmax: unknown option learning_rte; did you mean"),
        (with_options(max_steps="many"), "task digits, variant softmax: .*max_steps.*'many'"),
        (with_options(seed=3), "options of task digits must not have seed: seeds says it"),
        (with_options(output_dir="x"), "must not have output_dir: the ledger says it"),
        (with_task(measure={"sigmas": []}), "sigmas of task digits must be a list that is not empty"),
        (with_task(measure={"sigmas": [0]}), "measure of task digits: sigmas .*got 0"),
        (with_task(measure={"attacks": ["fgsm"], "epsilons": [0.0]}), "measure of task digits: epsilons .*got 0"),
        (with_task(measure={"attacks": ["fsgm"]}), "measure of task digits: .*'fsgm'"),
        (with_task(measure={"epsilons": ["8/0"]}), "epsilons of task digits must be numbers or fractions.*got '8/0'"),
        (with_task(measure={"fractions": [0.1]}), "measure of task digits must name .*sigmas.*, got 'fractions'"),
        ({"matched": [{"name": "wide", "like": "sos", "in": "compute"}]}, "like must name one of the variants"),
        ({"matched": [{"name": "wide", "like": "twicing", "in": "size"}]}, "in must be one of parameters, compute"),
        (
            {"matched": [{"name": "softmax", "like": "twicing", "in": "compute"}]},
            "names .* must be new, got 'softmax'",
        ),
        (
            {"matched": [{"name": name, "like": "twicing", "in": "compute"} for name in ("a", "b")]},
            "two matched baselines are equal",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write_study: WriteStudy, changes: dict[str, Any], message: str) -> None:
    path = write_study(**changes)
    with pytest.raises(UsageError, match=message) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"a: [", b"- a", b"\xff\xfe\x00", None])
def test_what_is_no_yaml_mapping_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main(["study", str(path)])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("twice", ["seeds: 2", "tasks:", "name: tiny"])
def test_a_key_that_stands_twice_is_refused(write_study: WriteStudy, twice: str) -> None:
    path = write_study()
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{twice}\n", encoding="utf-8")
    key = twice.partition(":")[0]
    with pytest.raises(UsageError, match=f"not valid YAML: '{key}' stands twice in one mapping .* line"):
        read_study(path)


def test_an_option_without_a_value_is_the_default(write_study: WriteStudy) -> None:
    path = write_study(**with_task(options={**TINY_TASK["options"], "config_overrides": None}, measure=None))
    (task,) = read_study(path).tasks
    assert (task.options.get("config_overrides"), task.measure) == (None, {})


def test_runs_are_variants_times_seeds_times_tasks(write_study: WriteStudy) -> None:
    tasks = {"one": TINY_TASK, "two": {**TINY_TASK, "recipe": "digits_vit.yaml"}}
    last = {"name": "last", "preset": "twicing", "fields": {"boosted_layers": [-1]}}
    study = read_study(write_study(tasks=tasks, variants=["softmax", last], seeds=[4, 2]))
    runs = study.runs
    assert [run.name for run in runs[:4]] == [
        "one-softmax-seed4", "one-last-seed4", "two-softmax-seed4", "two-last-seed4",
    ]  # fmt: skip
    assert len({run.name for run in runs}) == len({run.digest for run in runs}) == 8
    words = runs[3].task.words(runs[3].variant, 4)
    assert {"--preset=twicing", "--seed=4", "--data_seed=4", "boosted_layers=[-1]", "hidden_size=16"} <= set(words)
    assert "--num_train_epochs=20" in words  # of the recipe
    assert "--learning_rate=0.001" in words  # which the task's own options override


def test_where_data_lie_is_no_part_of_a_run(write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study()
    here = read_study(path)
    there = read_study(path, [f"digits.dataset_name={tmp_path}"])
    assert here.runs[0].digest == there.runs[0].digest
    assert f"--dataset_name={tmp_path.resolve()}" in there.runs[0].task.words(there.variants[0], 0)
    for place, message in (
        ("digits.learning_rate=1", "--data must be TASK.OPTION=VALUE"),
        ("dataset_name=x", "--data must be TASK.OPTION=VALUE"),
        ("letters.dataset_name=x", "must name a task of the study \\(digits\\)"),
    ):
        with pytest.raises(UsageError, match=message):
            read_study(path, [place])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_say_how_they_are_run(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    head = path.read_text(encoding="utf-8").partition("name:")[0]
    assert f"imgproc-attn study training/configs/studies/{path.name}" in head
    assert "Run time:" in head


def test_the_study_that_the_page_explains_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "study.yaml"
    path.write_text(block, encoding="utf-8")
    assert len(read_study(path).runs) == 9


def test_a_variant_may_have_its_own_training(write_study: WriteStudy) -> None:
    """Its options win over the task's, and are part of what a run is; runs without any are what they were."""
    tuned = {"name": "tuned", "preset": "softmax", "options": {"learning_rate": 0.5}}
    runs = {run.variant.name: run for run in read_study(write_study(variants=["softmax", tuned])).runs}
    words = {name: run.task.words(run.variant, run.seed) for name, run in runs.items()}
    assert set(words["tuned"]) - set(words["softmax"]) == {"--learning_rate=0.5"}
    assert len(words["tuned"]) == len({word.partition("=")[0] for word in words["tuned"]})
    assert runs["tuned"].identity["variant"] == {**tuned, "fields": {}}
    assert runs["softmax"].identity["variant"] == {"name": "softmax", "preset": "softmax", "fields": {}}


def test_the_report_says_what_variants_have_of_their_own(write_study: WriteStudy) -> None:
    last_two = {"name": "twicing", "preset": "twicing", "fields": {"boosted_layers": [-2, -1]}}
    tuned = {"name": "tuned", "preset": "softmax", "options": {"learning_rate": 0.5}}
    said = "With values of their own: twicing (boosted_layers [-2, -1]), tuned (preset softmax, learning_rate 0.5)."
    assert of_their_own(read_study(write_study(variants=["softmax", last_two, tuned]))) == said
    assert of_their_own(read_study(write_study())) == ""


def test_shard_is_i_of_n() -> None:
    assert parse_shard("2/8") == (2, 8)
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UsageError, match="--shard must be i/n"):
            parse_shard(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--jobs", "0"],
        ["--budget", "-1"],
        ["--threads", "0"],
        ["--shard", "3/2"],
        ["--cpus", "2"],
        ["--address", "auto"],
        ["--gpus", "nan", "--engine", "ray"],
        ["--jobs", "2", "--engine", "ray"],
    ],
)
def test_options_out_of_range_are_refused(
    write_study: WriteStudy, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["study", str(write_study()), *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("budget", "5"), ("jobs", "1"), ("threads", "1"), ("shard", "1/1"), ("engine", "local"), ("cpus", "1")],
)
def test_a_report_refuses_what_is_for_runs(
    write_study: WriteStudy, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["study", str(write_study()), "--ledger", str(tmp_path / "ledger"), "--report", f"--{option}", value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--{option} is for runs, and --report does none, got {value}" in error
