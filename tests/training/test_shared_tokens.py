"""What `--context_parallel` refuses, before data are read; what it computes is in `test_sharded_runs.py`."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import train_causal_lm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.early_checks import check_model
from hf_imgproc_attn.training_support.shared_tokens import check_even, check_shared_tokens
from tests.training.conftest import TINY_GPT2

SETTINGS = {
    "world_size": 4,
    "deepspeed": None,
    "torch_compile": False,
    "label_smoothing_factor": 0.0,
    "average_tokens_across_devices": True,
}


def arguments(*words: str) -> Any:
    return train_causal_lm.read_arguments([*words, "--config_overrides", *TINY_GPT2])


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ("--context_parallel 3", {}, "context_parallel must divide the number of processes, 4, got 3"),
        ("--context_parallel 2 --block_size 33", {}, "block_size must be a multiple of context_parallel 2, got 33"),
        ("--context_parallel 2 --streaming", {}, "streaming must be False with context_parallel 2, got True"),
        ("--context_parallel 2 --peft lora", {}, "peft must be None with context_parallel 2, got lora"),
        ("--context_parallel 2", {"deepspeed": "zero3.json"}, "deepspeed must be None with context_parallel 2"),
        ("--context_parallel 2", {"torch_compile": True}, "torch_compile must be False with context_parallel 2"),
        ("--context_parallel 2", {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0 with"),
        (
            "--context_parallel 2",
            {"average_tokens_across_devices": False},
            "average_tokens_across_devices must be True",
        ),
    ],
)
def test_options_that_are_not_exact_are_refused(words: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        check_shared_tokens(arguments(*words.split()), SimpleNamespace(**{**SETTINGS, **settings}))


def test_what_is_exact_is_not_refused() -> None:
    check_shared_tokens(arguments("--context_parallel", "2", "--block_size", "34"), SimpleNamespace(**SETTINGS))
    check_shared_tokens(arguments("--streaming"), SimpleNamespace(**{**SETTINGS, "label_smoothing_factor": 0.1}))
    check_even(33, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context_parallel 2", "error: context_parallel must divide the number of processes, 1, got 2"),
        ("--context_parallel 0", "error: context_parallel must be an integer >= 1, got 0"),
    ],
)
def test_one_process_shares_nothing(
    words: str, message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_causal_lm.main([*words.split(), "--use_cpu", "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset delta", "context_parallel: context_parallel cannot serve boosting='delta' of layer 0"),
        ("--preset forgetting", "cannot serve position_kernel='forget' of layer 0: its gates are summed"),
        ("--preset twicing --config_overrides attn_pdrop=0.1", "attn_pdrop must be 0 with context_parallel 2 where"),
    ],
)
def test_models_that_cannot_share_are_refused_before_data(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        check_model("causal-lm", arguments("--context_parallel", "2", *words.split()))
    check_model("causal-lm", arguments(*words.split()))


def test_stock_checkpoints(tmp_path: Any) -> None:
    """Their configurations have dropout; without a boosted filter it may stay."""
    tiny = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    GPT2LMHeadModel(GPT2Config(**tiny, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    words = ["--context_parallel", "2", "--model_name_or_path", str(tmp_path / "gpt2")]
    for preset, refused in (("softmax", False), ("twicing", True)):
        given = train_causal_lm.read_arguments([*words, "--preset", preset])
        if refused:
            with pytest.raises(UsageError, match="attn_pdrop must be 0"):
                check_model("causal-lm", given)
        else:
            check_model("causal-lm", given)


def test_filters_in_models_of_another_type(tmp_path: Any) -> None:
    """Every layer needs one."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=9)).save_pretrained(tmp_path / "llama")
    words = ["--context_parallel", "2", "--model_name_or_path", str(tmp_path / "llama"), "--preset", "twicing"]
    check_model("causal-lm", train_causal_lm.read_arguments(words))
    with pytest.raises(UsageError, match=re.escape("without one: model.layers.1.self_attn")):
        check_model("causal-lm", train_causal_lm.read_arguments([*words, "--boosted_layers", "0"]))
