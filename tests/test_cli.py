"""The command line: instant help, one line for the user's mistakes, and what each sub-command does."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest
import torch

import hf_imgproc_attn
from hf_imgproc_attn import PRESETS, cli, shipped_files
from tests.helpers import RunPython

MODULE = ("-m", "hf_imgproc_attn.cli")


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line, in this process."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def stock_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stock GPT-2 with a tokenizer, on disk."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stock")
    fields = {"n_layer": 3, "n_head": 2, "n_embd": 8, "vocab_size": 12, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=11, eos_token_id=11)).save_pretrained(folder)
    vocab = {letter: index for index, letter in enumerate("abcdefghijk")} | {"<|endoftext|>": 11}
    GPT2Tokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("convert", "--help"),
        ("benchmark", "--help"),
        ("denoise", "--help"),
        ("robustness", "--help"),
        ("variants", "--help"),
        ("precision", "--help"),
        ("calls", "--help"),
        ("presets",),
    ],
)
def test_what_needs_no_model_imports_no_model(run_python: RunPython, arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom hf_imgproc_attn import cli\n"
        f"try:\n    cli.main({list(arguments)!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    result = run_python("-c", code, fresh=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train-image", "--help"), ("train-lm", "--help"), ("evaluate", "--help")]
)
def test_help_is_instant(run_python: RunPython, arguments: tuple[str, ...]) -> None:
    """Importing torch alone takes longer than this bound; the best of three leaves room for a busy machine."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_python(*MODULE, *arguments, fresh=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
        assert "usage: imgproc-attn" in result.stdout
    assert min(seconds) < 0.8


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(capsys, "--version") == (0, f"imgproc-attn {hf_imgproc_attn.__version__}\n", "")


def test_presets_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_main(capsys, "presets")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert [row[0] for row in rows[1:]] == list(PRESETS)
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert by_name["bilateral_twicing"] == {
        "preset": "bilateral_twicing",
        "content_kernel": "dot_product",
        "position_kernel": "untied",
        "boosting": "twicing",
        "residual": "standard",
        "feedback": "none",
        "gate": "none",
        "normalisation": "softmax",
        "learn_bandwidths": "True",
    }
    assert by_name["boosted_residual"]["residual"] == "twicing"
    assert by_name["pidformer"]["feedback"] == "pid"


def test_convert_saves_a_variant_with_its_tokenizer(
    capsys: pytest.CaptureFixture[str], stock_gpt2: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "variant"
    arguments = ["convert", str(stock_gpt2), "--preset", "twicing", "--output", str(output)]
    status, out, err = run_main(capsys, *arguments, "--set", "boosted_layers=[-2, -1]", "--set", "residual=standard")
    assert status == 0, err
    assert "GPT2LMHeadModel" in out
    assert str(output) in out.splitlines()[-1]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is hf_imgproc_attn.ImgProcGPT2LMHeadModel
    assert (model.config.boosting, model.config.boosted_layers) == ("twicing", [-2, -1])
    assert AutoTokenizer.from_pretrained(output)("abc").input_ids == [0, 1, 2]

    # a second run must not mix two checkpoints in one folder
    status, _, err = run_main(capsys, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "new or empty folder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("train-video",), "train-video"),
        (("convert", "x"), "--preset"),
        (("convert", "./missing", "--preset", "twicing", "--output", "o"), "does not exist"),
        (("convert", "SOURCE", "--preset", "blur", "--output", "o"), "preset must be one of softmax"),
        (("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "boosting_steps"), "FIELD=VALUE"),
        (("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "boosting_step=3"), "boosting_steps?"),
        (("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "return_report=1"), "return_report"),
        (("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "boosting_steps=true"), "True"),
        (
            ("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "boosted_layers=[7]"),
            "boosted_layers must be integers from -3 to 2",
        ),
        (("convert", "SOURCE", "--preset", "twicing", "--output", "o", "--set", "a=1", "--set", "a=2"), "a twice"),
        (("benchmark", "--threads", "0"), "--threads must be an integer >= 1"),
        (("benchmark", "--threads", "two"), "--threads"),
        (("benchmark", "--lengths", "1"), "--lengths must be integers >= 2, got 1"),
        (("benchmark", "--max-seconds", "0"), "--max-seconds must be a number > 0, got 0.0"),
        (("benchmark", "--max-mib", "nan"), "--max-mib must be a number > 0, got nan"),
        (
            ("benchmark", "--suite", "attention", "speed"),
            "suite must be one of attention, axes, padding, decode, layers",
        ),
        (("benchmark", "--dtype", "float8"), "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (("benchmark", "--device", "cuda:0"), "device must be there, got 'cuda:0'"),
    ],
)
def test_mistakes_of_the_user_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stock_gpt2: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_main(capsys, *(argument.replace("SOURCE", str(stock_gpt2)) for argument in arguments))
    assert status == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("imgproc-attn: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, stock_gpt2: Path, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(importlib.import_module("hf_imgproc_attn.conversion"), "convert_checkpoint", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["convert", str(stock_gpt2), "--preset", "twicing", "--output", str(tmp_path / "o")])


def test_an_interrupted_conversion_leaves_nothing_in_the_way(
    monkeypatch: pytest.MonkeyPatch, stock_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PreTrainedModel

    def interrupt(self: PreTrainedModel, folder: Path, **_: object) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupt)
    words = ("convert", str(stock_gpt2), "--preset", "twicing", "--output", str(tmp_path / "o"))
    assert run_main(capsys, *words) == (130, "", "interrupted\n")
    assert not (tmp_path / "o").exists()


def test_a_source_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "nowhere", "a b/c"):
        status, _, err = run_main(capsys, "convert", source, "--preset", "twicing", "--output", str(tmp_path / "o"))
        assert status == 2
        assert err.startswith(f"imgproc-attn: error: {source!r} must be a checkpoint, and is none: ")


@pytest.mark.parametrize(("command", "resumes"), [("evaluate", False), ("train-lm", True)])
def test_only_what_can_be_resumed_says_so(
    command: str, resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluate_checkpoint._run", interrupt)
    monkeypatch.setattr("train_causal_lm.train", interrupt)
    status, _, err = run_main(capsys, command)
    assert status == 130
    assert err.startswith("interrupted")
    assert ("--resume" in err) == resumes


def test_training_arguments_pass_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script sees its own options, --help included, finds its siblings, and decides about the exit status."""
    (tmp_path / "sibling.py").write_text("STATUS = 7\n")
    (tmp_path / "script.py").write_text(
        "import sys\nfrom sibling import STATUS\ndef main(argv):\n    print(sys.argv, argv)\n    return STATUS\n"
    )
    monkeypatch.setattr(cli, "shipped_file", lambda name: tmp_path / Path(name).name)
    monkeypatch.setitem(cli.TRAINING_SCRIPTS, "train-lm", ("script", "for this test"))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, out, _ = run_main(capsys, "train-lm", "--help", "--set", "x")
    assert status == 7
    assert out == "['imgproc-attn train-lm', '--help', '--set', 'x'] ['--help', '--set', 'x']\n"


def test_incomplete_installation_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped_files, "__file__", str(tmp_path / "package" / "shipped_files.py"))
    with pytest.raises(FileNotFoundError, match=r"training/train_image_classification\.py is neither in"):
        cli.main(["train-image", "--help"])


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("datasets", "train", "train-image --preset twicing"),
        ("evaluate", "train", "train-lm --preset twicing"),
        ("sklearn", "train", "evaluate run"),
        ("skimage", "filters", "denoise camera"),
        ("matplotlib", "viz", "benchmark --quick"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, extra: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = run_main(capsys, *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    hint = f'pip install ".[{extra}]" in a checkout of this package'
    assert err.endswith(f"this needs {package}, which is not installed: {hint}\n")


def test_curves_of_a_publication_name_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_imgproc_attn.cards.curves import draw_curves
    from hf_imgproc_attn.errors import UsageError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'pip install "\.\[hub\]"'):
        draw_curves({"train_loss": [[1, 2.0]]}, tmp_path / "x.png")
