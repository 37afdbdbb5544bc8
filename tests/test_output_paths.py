"""Where commands write: what cannot be written is refused before work begins, and what was made is not lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn import cli
from hf_imgproc_attn.errors import UsageError, disk_problem
from hf_imgproc_attn.output_paths import (
    check_new_files,
    check_output_file,
    check_output_folder,
    write_or_keep,
    writing,
)
from tests.helpers import ROOT, prepared_python, run_command
from tests.training.conftest import TINY_GPT2

TINY = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no", "--max_steps", "1"]


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("mine", encoding="utf-8")
    return path


def test_folders_that_can_be_made_are_accepted_and_not_made(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "and" / "deep"):
        assert check_output_folder(folder) == folder
    for file in (tmp_path / "x.json", tmp_path / "new" / "x.json"):
        assert check_output_file(file) == file
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(a_file: Path) -> None:
    with pytest.raises(UsageError, match=r"^output must be a folder, got '.*notes\.txt', which is a file$"):
        check_output_folder(a_file)
    with pytest.raises(UsageError, match=r"^output must be a folder, got '.*/new', but '.*notes\.txt' is a file$"):
        check_output_folder(a_file / "new")
    # Nobody, not even root, makes folders there.
    with pytest.raises(UsageError, match=r"^output_dir '/proc/new/run' cannot be written: "):
        check_output_folder("/proc/new/run", "output_dir")
    with pytest.raises(UsageError, match=r"^output must be a file, got '/dev/full', which is no ordinary file$"):
        check_output_file("/dev/full")
    with pytest.raises(UsageError, match=r"^output must be a file, got '.*', which is a folder$"):
        check_output_file(a_file.parent)
    with pytest.raises(UsageError, match=r"^the folder of output must be a folder, .*notes\.txt', which is a file"):
        check_output_file(a_file / "x.json")
    assert check_output_file(a_file) == a_file
    assert a_file.read_text(encoding="utf-8") == "mine"


def test_what_is_there_is_replaced_only_on_request(a_file: Path) -> None:
    new, folder = a_file.with_name("new.txt"), a_file.parent
    check_new_files([new], force=False)
    check_new_files([new, a_file], force=True)
    with pytest.raises(UsageError, match=r"^output '.*notes\.txt' is there already; --force replaces it$"):
        check_new_files([new, a_file], force=False)
    with pytest.raises(UsageError, match=r"^output must be a file, got '.*', which is a folder$"):
        check_new_files([folder], force=True)


@pytest.mark.parametrize(("suite", "name"), [("decode", "a.json"), ("attention", "a.png")])
def test_benchmark_replaces_only_on_request(
    suite: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    words = ["benchmark", "--quick", "--suite", suite, "--output", str(tmp_path / "a.json")]
    assert refused(capsys, words) == f"output '{tmp_path / name}' is there already; --force replaces it"
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
    words = ["benchmark", "--quick", "--suite", suite, "--output", str(tmp_path / "b.png")]
    assert refused(capsys, words).startswith("output must not end in .png, as the plot beside it does, got ")


def test_read_only_files_are_refused(a_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root may write whatever the permissions say
    with pytest.raises(UsageError, match=r"^output '.*notes\.txt' cannot be written: Permission denied$"):
        check_output_file(a_file)


def test_what_cannot_be_written_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = tmp_path / "full" / "result.json"

    def write(path: Path) -> None:
        if path == wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_text("42", encoding="utf-8")

    with pytest.raises(
        UsageError, match="cannot be written: No space left on device; the result is kept in"
    ) as caught:
        write_or_keep(wanted, write)
    kept = Path(str(caught.value).split("'")[-2])
    assert (kept.name, kept.read_text(encoding="utf-8")) == ("result.json", "42")
    assert not wanted.exists()

    def never(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.raises(UsageError, match="the result is lost"):
        write_or_keep(wanted, never)


def test_errors_of_safetensors_are_one_line() -> None:
    from safetensors import SafetensorError

    with pytest.raises(UsageError, match=r"^output 'x' cannot be written: I/O error$"), writing("x"):
        raise SafetensorError("I/O\nerror")
    with pytest.raises(KeyError), writing("x"):
        raise KeyError("a bug")


def test_only_errors_of_the_disk_are_the_users() -> None:
    assert disk_problem(OSError(errno.EROFS, "Read-only file system", "/x/y")) == "'/x/y': Read-only file system"
    assert disk_problem(OSError(errno.ENOSPC, "No space left on device")) == "'output': No space left on device"
    assert disk_problem(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None


@pytest.mark.parametrize("place", ["BELOW/new", "FILE", "/proc/new"])
@pytest.mark.parametrize(
    "command",
    [
        ["convert", "someone/model", "--preset", "twicing", "--output"],
        ["denoise", "camera", "--output"],
        ["pull", "someone/model", "--output"],
        ["train-image", "--preset", "twicing", "--output_dir"],
        ["train-lm", "--preset", "twicing", "--output_dir"],
    ],
    ids=lambda command: str(command[0]),
)
def test_folders_are_checked_before_work_begins(
    command: list[str], place: str, a_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what the commands name exists, so none of them gets further than the check."""
    output = place.replace("BELOW", str(a_file)).replace("FILE", str(a_file))
    assert refused(capsys, [*command, output]).startswith(("output", "output_dir"))
    assert a_file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("place", ["BELOW/x.json", "FOLDER", "/dev/full", "/proc/new/x.json"])
def test_benchmark_checks_its_file_before_it_measures(
    place: str, a_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place.replace("BELOW", str(a_file)).replace("FOLDER", str(a_file.parent))
    assert "output" in refused(capsys, ["benchmark", "--quick", "--output", output])


def test_benchmark_keeps_its_rows_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_imgproc_attn.measure import benchmark

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output = tmp_path / "wanted" / "benchmark.json"
    write_json = benchmark.write_json

    def full(path: Path, content: dict[str, Any]) -> Path:
        if path == output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_json(path, content)

    monkeypatch.setattr(benchmark, "write_json", full)
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "--quick", "--suite", "decode", "--output", str(output)])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "ratio" in printed.out
    last = printed.err.splitlines()[-1]
    assert "No space left on device; the result is kept in" in last
    assert json.loads(Path(last.split("'")[-2]).read_text(encoding="utf-8"))["rows"]


def test_a_conversion_that_cannot_be_saved_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

    fields = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 12, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "stock")

    def full(self: Any, folder: Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    for output in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        words = ["convert", str(tmp_path / "stock"), "--preset", "twicing", "--output", str(output)]
        assert "cannot be written: Error while serializing: I/O error: No space left" in refused(capsys, words)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_trained_model_that_cannot_be_saved_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_causal_lm
    from transformers import AutoModelForCausalLM

    from hf_imgproc_attn.training_support.trainer import ScriptTrainer

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save_model = ScriptTrainer.save_model

    def full(self: ScriptTrainer, output_dir: str | None = None, **options: Any) -> None:
        if output_dir is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.args.output_dir))
        save_model(self, output_dir, **options)

    monkeypatch.setattr(ScriptTrainer, "save_model", full)
    words = ["--config_overrides", *TINY_GPT2, "--block_size", "32", "--tokenizer_vocab_size", "300", *TINY]
    assert train_causal_lm.main([*words, "--max_train_samples", "90", "--output_dir", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "there is no complete checkpoint yet" in last
    assert AutoModelForCausalLM.from_pretrained(last.rpartition("is kept in ")[2]).config.n_layer == 2


@pytest.mark.parametrize(
    ("shell", "status", "error"),
    [
        ("COMMAND > /dev/full", 2, "imgproc-attn: error: 'output': No space left on device\n"),
        ("COMMAND | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
    ],
)
@pytest.mark.parametrize("command", ["presets", "variants --markdown"])
def test_standard_output_that_is_full_or_closed(command: str, shell: str, status: int, error: str) -> None:
    line = shell.replace("COMMAND", f"{prepared_python()} -m hf_imgproc_attn.cli {command}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_command(["bash", "-c", line], env=environment)
    assert (done.returncode, done.stderr) == (status, error)


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Run the command line, which has to refuse, and return its one line without the program's name."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(str(stop.code))
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    return line.removeprefix("imgproc-attn: ").removeprefix("error: ")
