"""Families of models against a plain loop: a dozen here, all of them where time allows."""

import pytest

from distillkit.models import capabilities as probing
from distillkit.models.capabilities import capabilities
from distillkit.testing.families import LAYERS, VOCAB, causal_types, tiny_config, tiny_family
from distillkit.testing.family_checks import FamilyReport, check_family, check_generation, check_scores, plain_model

LAYOUTS = {
    "llama": "packed",
    "qwen2": "packed",
    "qwen3_moe": "packed",
    "gemma3_text": "packed",
    "gpt2": "packed",
    "gpt_oss": "padded",
    "deepseek_v3": "packed",
    "lfm2": "padded",
    "qwen3_5_text": "padded",
    "zamba2": "padded",
    "rwkv": "padded",
    "llama4_text": "padded",
    "bart": "padded",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_family_gives_what_a_plain_loop_gives(name):
    model = tiny_family(name)
    assert capabilities(model).layout == LAYOUTS[name]
    check_scores(model, plain_model(model))
    check_generation(model, plain_model(model))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_report_says_what_was_tried():
    report = check_family("gpt2")
    assert report.faults == []
    results = (report.scores, report.generation, report.pruning, report.lora, report.export)
    assert results == ("right",) * 5
    assert (report.built, report.layout, report.cache) == ("right", "packed", "padded")


def test_a_refusal_and_a_model_that_is_not_built_are_no_faults():
    refused, absent = check_family("cpmant"), check_family("musicgen")
    assert refused.faults == absent.faults == []
    assert refused.scores.startswith("refused: CpmAntForCausalLM: tokens of CpmAntForCausalLM attend to later ones")
    assert absent.built.startswith("raises: ")


# The checks see what is wrong.


@pytest.fixture
def _gullible(monkeypatch):
    """Tries that find nothing."""
    for name in ("_recurrent", "_packed", "_padded"):
        monkeypatch.setattr(probing._Trial, name, lambda self: None)
    monkeypatch.setattr(probing, "unusual_masks", lambda calls: None)


@pytest.mark.usefixtures("_gullible")
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "jamba", "llama4_text"])
def test_packed_rows_of_a_model_that_can_not_have_them_are_a_difference(name):
    model = tiny_family(name)
    assert capabilities(model).layout == "packed"
    with pytest.raises(AssertionError, match="log-probabilities of shared rows by"):
        check_scores(model, plain_model(model))


def test_another_model_is_a_difference():
    model, other = tiny_family("llama"), tiny_family("llama", seed=1)
    with pytest.raises(AssertionError, match="log-probabilities of shared rows by"):
        check_scores(model, plain_model(other))
    with pytest.raises(AssertionError, match=r"token \d after a prompt of \d+ tokens"):
        check_generation(model, plain_model(other))


def test_a_report_counts_differences_and_raw_errors():
    report = FamilyReport("x", lora="differs: by 3", pruning="raises: KeyError: 0", export="refused: no")
    assert report.faults == ["pruning raises: KeyError: 0", "lora differs: by 3"]


# The tiny models.


def test_every_type_of_transformers_is_listed():
    assert len(causal_types()) > 150
    assert {"llama", "gpt2", "mamba2", "lfm2"} < set(causal_types())


@pytest.mark.parametrize("name", ["llama", "qwen3_5_moe", "gemma2", "bart"])
def test_a_tiny_model_is_small_and_crosses_its_thresholds(name):
    config = tiny_config(name).get_text_config(decoder=True)
    assert config.vocab_size == VOCAB
    assert config.num_hidden_layers == LAYERS
    assert sum(parameter.numel() for parameter in tiny_family(name).parameters()) < 300_000
    if name == "gemma2":
        assert config.sliding_window == 4
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}


def test_a_tiny_model_depends_on_its_seed_alone():
    first, second, other = (tiny_family("llama", seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), second.parameters(), other.parameters(), strict=True)
    assert all((own == same).all() for own, same, _ in pairs)
    assert not (first.lm_head.weight == other.lm_head.weight).all()
