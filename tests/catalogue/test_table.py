"""The table of variants says what the code does, and docs/variants.md holds it."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_imgproc_attn import (
    PRESETS,
    ImgProcBertConfig,
    ImgProcGPT2Config,
    ImgProcGPT2LMHeadModel,
    ImgProcViTConfig,
    ImgProcViTModel,
    cli,
)
from hf_imgproc_attn.catalogue import table
from hf_imgproc_attn.catalogue.presets import REASONS, VARIANTS
from hf_imgproc_attn.catalogue.works import PAPERS
from hf_imgproc_attn.models import backend_sdpa
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.spec_axes import WEIGHTS_ONE_BY_ONE
from tests.helpers import ROOT, RunPython
from tests.models.helpers import sharpen_

PAGE = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")


def test_every_preset_has_its_row_and_no_other() -> None:
    assert list(VARIANTS) == list(PRESETS)
    used = {reason for preset in PRESETS for reason in table.limits(preset)}
    assert used == set(REASONS)
    assert len({variant.text for variant in VARIANTS.values()}) == len(PRESETS)
    assert not any("|" in variant.text for variant in VARIANTS.values())
    assert set(table.COLUMNS) == set(vars(table.row("softmax")))


def test_every_paper_has_author_year_and_a_key_of_its_own() -> None:
    keys = []
    for paper in PAPERS.values():
        found = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\n\}", paper.bibtex, re.DOTALL)
        assert found is not None
        keys.append(found[2])
        year = re.search(r"\b((?:19|20)\d\d), ", paper.reference)
        assert year is not None
        assert re.search(rf"^  year +=\ \{{{year[1]}\}}", paper.bibtex, re.MULTILINE)
        first_author = re.split(r"[, ]", paper.reference)[0]
        plain = re.sub(r"\{\\\W(\w)\}", r"\1", paper.bibtex).replace("Buhlmann", "Bühlmann")
        assert re.search(rf"^  author +=\ \{{{first_author}, ", plain, re.MULTILINE)
        for link in re.findall(r"arxiv\.org/abs/([\d.]+)", paper.reference):
            assert link in paper.bibtex
        assert paper.bibtex.count("{") == paper.bibtex.count("}")
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("preset", PRESETS)
def test_formulas_of_parameters_count_a_model(preset: str) -> None:
    sizes = table.Sizes(d=24, H=3, L=2, N=40)
    fields = {"n_embd": sizes.d, "n_head": sizes.H, "n_layer": sizes.L, "n_positions": sizes.N}
    rest = {"vocab_size": 7, "bos_token_id": 0, "eos_token_id": 0}

    if not table.is_causal(preset):
        assert table.parameter_terms(preset) == []
        return

    def count(name: str) -> int:
        return int(ImgProcGPT2LMHeadModel(ImgProcGPT2Config.from_preset(name, **fields, **rest)).num_parameters())

    extra = sum(term.count(sizes) for term in table.parameter_terms(preset))
    assert count(preset) - count("softmax") == extra
    # The text is the same formula.
    text = table.parameters(preset).replace("none", "0").replace("²", "**2")
    text = re.sub(r"(?<=[\w)])(?=[dHLN(])", "*", text)
    assert eval(text, {}, sizes._asdict()) == extra


@pytest.mark.parametrize("preset", PRESETS)
def test_passes_are_counted_in_a_model(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass of the back-end without A is one scaled_dot_product_attention."""
    if preset in ("forgetting", "delta"):  # of causal models
        assert table.passes(preset) == 1
        return
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(backend_sdpa, "has_fused_sinks", lambda tensors: False)  # that call has no public name
    config = ImgProcViTConfig.from_preset(
        preset,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    config.filter_backend = "sdpa"
    if preset in ("sigmoid", "softpick"):
        with pytest.raises(ValueError, match="softmax only, got normalisation"):
            ImgProcViTModel(config)(torch.zeros(1, 3, 8, 8))
        return
    if table.example(preset)[1].spec.boosting in WEIGHTS_ONE_BY_ONE:
        assert "sdpa" not in table.back_ends(preset)
        with pytest.raises(ValueError, match=r"boosting='\w+' looks at its weights one by one"):
            ImgProcViTModel(config)(torch.zeros(1, 3, 8, 8))
        return
    ImgProcViTModel(config)(torch.zeros(1, 3, 8, 8))
    assert len(calls) == 2 * table.passes(preset)
    assert table.cost(preset).startswith(f"{table.passes(preset)} pass")


@pytest.mark.parametrize("preset", PRESETS)
def test_cached_decoding_and_limits_are_what_a_model_does(preset: str) -> None:
    if not table.is_causal(preset):
        with pytest.raises(StrictDataclassError, match="depend on later tokens"):
            ImgProcGPT2Config.from_preset(preset)
        assert table.cached_decoding(preset) == "-"
        assert "causal models" in table.limits(preset)
        return
    torch.manual_seed(0)
    config = ImgProcGPT2Config.from_preset(
        preset, n_embd=8, n_head=2, n_layer=2, n_positions=6, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    model = sharpen_(ImgProcGPT2LMHeadModel(config).double().eval())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    whole = model(tokens).logits
    first = model(tokens[:, :4], use_cache=True)
    step = model(tokens[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(step[:, 0], whole[:, 4], rtol=0, atol=1e-10)
    changed = model(torch.tensor([[3, 1, 4, 1, 9]])).logits
    torch.testing.assert_close(changed[:, :4], whole[:, :4], rtol=0, atol=1e-12)  # causal

    long = torch.ones(1, 7, dtype=torch.long)
    if "longer texts" in table.limits(preset):
        with pytest.raises((ValueError, IndexError)):
            model(long)
    else:
        assert model(long).logits.isfinite().all()
    if "one-layer models" in table.limits(preset):
        with pytest.raises(StrictDataclassError, match="num_hidden_layers must be >= 2"):
            ImgProcGPT2Config.from_preset(preset, n_layer=1)
    else:
        ImgProcGPT2Config.from_preset(preset, n_layer=1)
    encoder = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    if "encoders of texts" in table.limits(preset):
        with pytest.raises(StrictDataclassError, match="blind to the order of the words"):
            ImgProcBertConfig.from_preset(preset, **encoder)
    elif "models without a causal mask" in table.limits(preset):
        with pytest.raises(StrictDataclassError, match="needs attention with a causal mask"):
            ImgProcBertConfig.from_preset(preset, **encoder)
    else:
        ImgProcBertConfig.from_preset(preset, **encoder)
    if "continuous batching" in table.limits(preset):
        with pytest.raises(ValueError, match="continuous batching needs a paged attention implementation"):
            model.generate_batch(tokens[:, :3].tolist())
    streams = len(table.example(preset)[1].stream_names)
    if preset == "forgetting":
        assert "keeps log f of each token" in table.cached_decoding(preset)
        return
    assert (f"{streams} stream" in table.cached_decoding(preset)) == (streams > 0)


def test_the_page_holds_the_table() -> None:
    between = re.search(r"<!-- variants: begin -->\n(.*?)\n<!-- variants: end -->", PAGE, re.DOTALL)
    assert between is not None, "the markers around the table of variants are missing"
    assert between[1] == f"{table.markdown_table()}\n\n{table.LEGEND}", "stale: imgproc-attn variants --markdown"


def test_command_prints_paragraphs_or_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants", "--markdown"]) == 0
    assert capsys.readouterr().out == f"{table.markdown_table()}\n\n{table.LEGEND}\n"
    assert cli.main(["variants"]) == 0
    paragraphs = capsys.readouterr().out.strip().split("\n\n")
    assert [paragraph.splitlines()[0] for paragraph in paragraphs[:-1]] == list(PRESETS)
    assert paragraphs[-1] == table.LEGEND
    assert "exp(-‖q - k‖²/h_y²)" in paragraphs[list(PRESETS).index("nlm")]


def test_table_is_rectangular() -> None:
    lines = table.markdown_table().splitlines()
    assert len(lines) == 2 + len(PRESETS)
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}


def test_terminals_without_unicode_get_the_table(run_python: RunPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe in the C locale: formulas are replaced, not a traceback."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    # Not prepared: if this test came first, the prepared interpreter of all others would have that encoding.
    result = run_python("-m", "hf_imgproc_attn.cli", "variants", fresh=True)
    assert result.returncode == 0, result.stderr
    assert "softmax" in result.stdout


def test_references_without_a_year_are_refused() -> None:
    with pytest.raises(ValueError, match="authors and year"):
        table._cite("Nobody, Nothing", markdown=True)


def test_layer_of_the_example_is_a_filter() -> None:
    for preset in PRESETS:
        config, layer = table.example(preset)
        assert isinstance(layer, AttentionFilter)
        assert layer.spec == config.layer_specs[1]
