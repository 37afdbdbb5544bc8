"""Command line and YAML: what overrides what, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.argument_parser import command_words, parse_arguments
from hf_imgproc_attn.training_support.arguments import (
    IMAGE_TRAINER_DEFAULTS,
    TEXT_TRAINER_DEFAULTS,
    Arguments,
    ImageDataArguments,
    TextDataArguments,
)
from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments
from tests.helpers import ROOT, RunPython

SCRIPTS = ("train_image_classification.py", "train_causal_lm.py")


def parse(*words: str) -> Arguments[ImageDataArguments]:
    return parse_arguments(words, ImageDataArguments, IMAGE_TRAINER_DEFAULTS, "test")


def training_arguments(tmp_path: Path, *words: str) -> Any:
    return build_training_arguments(parse(*words), IMAGE_TRAINER_DEFAULTS, str(tmp_path))


def write_yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_own_options_are_converted() -> None:
    words = "--preset twicing --max-train-samples 7 --horizontal_flip --validation_fraction=0.25 --resume false"
    arguments = parse(*words.split(), "--config_overrides", "hidden_size=8", "boosted_layers=[-1]")
    assert arguments.model.preset == "twicing"
    assert arguments.model.config_overrides == ["hidden_size=8", "boosted_layers=[-1]"]
    assert (arguments.data.max_train_samples, arguments.data.horizontal_flip) == (7, True)
    assert (arguments.data.validation_fraction, arguments.run.resume) == (0.25, False)
    assert arguments.trainer == {}


def test_trainer_fields_are_converted_by_type(tmp_path: Path) -> None:
    words = "--learning_rate 1e-3 --max-steps -1 --eval_strategy steps --data_seed none --use_cpu --logging_steps=3"
    args = training_arguments(tmp_path, *words.split(), "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert (args.learning_rate, args.max_steps, args.eval_strategy, args.data_seed) == (1e-3, -1, "steps", None)
    assert (args.use_cpu, args.logging_steps, args.lr_scheduler_kwargs) == (True, 3, {"num_cycles": 2})


def test_own_default_is_used_unless_given(tmp_path: Path) -> None:
    assert training_arguments(tmp_path).weight_decay == IMAGE_TRAINER_DEFAULTS["weight_decay"]
    assert training_arguments(tmp_path, "--weight_decay", "0").weight_decay == 0


def test_command_line_overrides_yaml(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path,
        "preset: bilateral\nseed: 3\nlearning_rate: 5e-4\nmax_train_samples: 9\nhorizontal_flip: true\n"
        "config_overrides: {hidden_size: 32, position_kernel: none, boosted_layers: [-1]}\n",
    )
    from_file = parse("--config", path)
    assert (from_file.model.preset, from_file.data.max_train_samples) == ("bilateral", 9)
    assert from_file.data.horizontal_flip
    both = parse("--seed", "4", "--config", path, "--preset", "twicing", "--config_overrides", "hidden_size=64")
    assert (both.model.preset, both.data.max_train_samples) == ("twicing", 9)
    assert both.model.config_overrides == [
        "hidden_size=32", 'position_kernel="none"', "boosted_layers=[-1]", "hidden_size=64",
    ]  # fmt: skip
    args = build_training_arguments(both, {}, str(tmp_path))
    # PyYAML reads 5e-4 as a text.
    assert (args.seed, args.learning_rate) == (4, 5e-4)


def test_help_is_instant_and_imports_no_torch(run_python: RunPython) -> None:
    for script in SCRIPTS:
        code = (
            "import runpy, sys\nsys.argv = ['script', '--help']\n"
            f"try:\n    runpy.run_path({str(ROOT / 'training' / script)!r}, run_name='__main__')\n"
            "except SystemExit as stop:\n    assert not stop.code\n"
            "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
        )
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            result = run_python("-c", code, fresh=True)
            seconds.append(time.perf_counter() - started)
            assert result.returncode == 0, result.stderr
        assert "--max_train_samples" in result.stdout
        assert "default: 0.1" in result.stdout
        assert "TrainingArguments" in result.stdout
        assert min(seconds) < 1.0


def test_help_trainer_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help-trainer")
    assert not stop.value.code
    assert "--gradient_accumulation_steps  (int, default 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "unknown option learning_rat; did you mean learning_rate?"),
        ("--max_train_sample 3", "did you mean max_train_samples?"),
        ("--qqqq 1", "unknown option qqqq; --help and --help-trainer list the options"),
        ("--seed x", "seed.*invalid int value: 'x'"),
        ("--seed none", "seed must have a value, got none"),
        ("--seed 1 2", "argument --seed: expected one value, got 1 2"),
        ("--eval_strategy sometimes", "eval_strategy.*invalid choice: 'sometimes'"),
        ("--do_train", "do_train is not used by this script: the script always trains"),
        ("--hub_token hf_secret", "hub_token is not used by this script: a secret comes from `hf auth login` or the"),
        ("--resume_from_checkpoint here", "resume_from_checkpoint is not used by this script: use --resume"),
        ("--lr_scheduler_type cosine_with_min_lr --warmup_steps -1", "warmup_steps"),
    ],
)
def test_wrong_trainer_option_is_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training_arguments(tmp_path, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset bilaterl", "preset: invalid choice: 'bilaterl'"),
        ("--max_train_samples 1.5", "max_train_samples: must be an integer or none, got '1.5'"),
        ("--max_train_samples 0", "max_train_samples must be an integer >= 1, got 0"),
        ("--validation_fraction 1", r"validation_fraction must be in \[0, 1\), got 1.0"),
        ("--random_crop_padding -1", "random_crop_padding must be an integer >= 0, got -1"),
        ("--horizontal_flip maybe", "horizontal_flip: must be true or false, got 'maybe'"),
        ("digits", "unexpected argument 'digits'"),
        ("--config nowhere.yaml", "config must be a readable YAML file, got 'nowhere.yaml'"),
    ],
)
def test_wrong_own_option_is_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(*words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--block_size 1", "block_size must be an integer >= 2, got 1"),
        ("--tokenizer_vocab_size 100", "tokenizer_vocab_size must be an integer >= 258, got 100"),
    ],
)
def test_wrong_text_option_is_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(words.split(), TextDataArguments, TEXT_TRAINER_DEFAULTS, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option learning_rat; did you mean learning_rate?"),
        ("max_train_samples: many", "max_train_samples: must be an integer or none, got 'many'"),
        ("config: other.yaml", "a file cannot include another"),
        ("- preset", "must hold a mapping, got list"),
        ("preset: twicing\npreset: softmax", "not valid YAML: 'preset' stands twice in one mapping"),
        ("3: twicing", "must hold a mapping of option names to values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training_arguments(tmp_path, "--config", write_yaml(tmp_path, text))


def test_mistake_ends_in_one_line_and_exit_code_2(run_python: RunPython, tmp_path: Path) -> None:
    script = str(ROOT / "training" / "train_causal_lm.py")
    result = run_python(script, "--learning_rat", "1", "--output_dir", str(tmp_path / "run"))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: unknown option learning_rat; did you mean learning_rate?"
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_imgproc_attn import errors

    monkeypatch.setitem(errors._EXTRAS, "viz", ("a_package_that_is_not_there",))
    with pytest.raises(UsageError, match=r'a_package_that_is_not_there.*pip install "\.\[viz\]"'):
        errors.require_extras("train", "viz")


def test_command_words_say_the_same_without_the_file(tmp_path: Path) -> None:
    config = write_yaml(
        tmp_path,
        "preset: twicing\nconfig_overrides: {boosted_layers: [-2, -1], hidden_act: relu}\nhorizontal_flip: true\n"
        "max_train_samples: 9\nvalidation_fraction: 0\nlearning_rate: 2e-3\nseed: 3\n"
        "fsdp_config: {min_num_params: 7}\n",
    )
    given = ["--config", config, "--resume", "--max-train-samples=none", "--seed", "4", "--eval_strategy", "no"]
    given += ["--config_overrides", "hidden_size=8", "--max_steps=-1", "--label_names", "a", "b", "--fp16"]
    given += ["--output_dir", "x"]
    first = parse(*given)
    words = command_words(first)
    assert "--config" not in words
    assert "--resume" not in words
    assert "--max_train_samples" not in words  # the default again
    again = parse(*words)
    assert (again.model, again.data, again.trainer) == (first.model, first.data, first.trainer)
    assert again.run.output_dir == "x"
    assert command_words(again) == words
    assert command_words(parse()) == []


def test_command_words_of_a_null(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, "report_to: null\n")
    assert command_words(parse("--config", config)) == ["--report_to", "none"]
