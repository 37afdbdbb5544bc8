"""Heads or tokens of one model in two processes: what they compute is what one process computes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.context_parallel import context_parallel, share_tokens
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.any_model.architectures import build as stock_model
from tests.helpers import ROOT, prepared_python, run_command
from tests.models.parallel_worker import CASES
from tests.models.variants import gpt2_config, made_once, token_ids, vit_config

# One worker waits for the two processes, for all tests that look at them.
once = pytest.mark.xdist_group("parallel")


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What the two processes of `parallel_worker.py` report of every case."""
    words = ["--full"] if request.config.getoption("--full") else []
    folder = made_once(tmp_path_factory, "parallel", lambda place: run_both(place, words))
    return [json.loads((folder / f"report_{rank}.json").read_text()) for rank in range(2)]


def run_both(folder: Path, words: list[str]) -> None:
    """Start the two processes."""
    command = [prepared_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_command(
        [*command, str(Path(__file__).with_name("parallel_worker.py")), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@once
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case: str, reports: list[dict[str, str]]) -> None:
    """Logits, losses and every gradient, to rounding; what cannot be shared is refused in both."""
    assert [report[case] for report in reports] == ["ok", "ok"]


@once
def test_every_other_variant(reports: list[dict[str, str]]) -> None:
    """With ``--full`` all of them; else those that were chosen, and nothing else."""
    assert {name: outcome for report in reports for name, outcome in report.items() if outcome != "ok"} == {}


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused_model(name: str) -> Any:
    if name == "vit":
        return ImgProcViTForImageClassification(vit_config("twicing"))
    if name == "llama":
        return stock_model("llama")
    if name == "half a llama":
        return apply_filter(stock_model("llama"), "twicing", layers=[0])
    return ImgProcGPT2LMHeadModel(gpt2_config(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "context_parallel shares the tokens of texts, ImgProcViTForImageClassification has none"),
        ("llama", "needs a filter in every self-attention layer of LlamaForCausalLM"),
        ("half a llama", "without one: model.layers.1.self_attn"),
        ("delta", "context_parallel cannot serve boosting='delta' of layer 0: it corrects each token by those before"),
        ("forgetting", "context_parallel cannot serve position_kernel='forget' of layer 0: its gates are summed"),
    ],
)
def test_models_that_cannot_share_their_tokens(name: str, message: str, alone: None) -> None:
    model = refused_model(name)
    with pytest.raises(ValueError, match=re.escape(message)), context_parallel(model):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.arange(6)[None]}, "position_ids must be None inside context_parallel"),
        ({"use_cache": True}, "use_cache must be False inside context_parallel"),
        ({"attention_mask": torch.ones(1, 12)}, "attention_mask must have shape (1, 6), got (1, 12)"),
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds, got neither"),
    ],
)
def test_calls_that_mean_something_else_there(given: dict[str, Any], message: str, alone: None) -> None:
    model = ImgProcGPT2LMHeadModel(gpt2_config("twicing"))
    ids = token_ids(batch=1, length=6)
    with context_parallel(model), pytest.raises(ValueError, match=re.escape(message)):
        model(**{"input_ids": ids, **given})
    model(ids, use_cache=True)  # the model is what it was


def test_dropout_on_boosted_weights_is_refused(alone: None) -> None:
    model = ImgProcGPT2LMHeadModel(gpt2_config("twicing", attn_pdrop=0.1)).train()
    with context_parallel(model), pytest.raises(ValueError, match=re.escape("must be 0 where processes share tokens")):
        model(token_ids(batch=1, length=6))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input_ids": (1, 7)}, "the length must be a multiple of the 2 processes that share it, got 7 tokens"),
        ({"input_ids": (1, 8), "labels": (8,)}, "batch must hold tensors of one shape [batch, length]"),
    ],
)
def test_batches_that_cannot_be_cut(
    shapes: dict[str, tuple[int, ...]], message: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        share_tokens({name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()})
