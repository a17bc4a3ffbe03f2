"""Caches that are tried before they are used: keys and values, windows, recurrent states, and none."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from distillkit.generators import kv_cache
from distillkit.generators.decoding import cache_use
from distillkit.generators.transformers import TransformersGenerator
from distillkit.testing.families import tiny_family
from distillkit.testing.family_checks import check_generation, plain_model
from helpers.families import made

ATTENTION = ["llama", "gemma2", "gemma3_text", "gpt2", "bloom", "mpt", "falcon"]
STATE = ["lfm2", "qwen3_5_text", "qwen3_next", "granitemoehybrid", "jamba", "falcon_h1", "bamba", "zamba2"]
STATE_ALONE = ["mamba", "mamba2", "falcon_mamba"]
PADDED = [*ATTENTION, *STATE, *STATE_ALONE]
EQUAL = ["llama4_text", "bart"]
NONE = ["rwkv", "xlstm", "openai-gpt", "minimax", "recurrent_gemma"]


@pytest.mark.parametrize(
    ("name", "use"),
    [*((name, "padded") for name in PADDED), *((name, "equal") for name in EQUAL), *((name, "none") for name in NONE)],
)
def test_responses_are_those_of_a_full_forward_pass_per_token(name, use):
    model = tiny_family(name)
    assert cache_use(model) == use
    check_generation(model, plain_model(model))  # rows of several lengths, some of which end before others


def test_generation_without_a_cache_is_logged_once(caplog):
    model = tiny_family("rwkv")
    with caplog.at_level(logging.INFO, logger="distillkit.generators.decoding"):
        for _ in range(2):
            check_generation(model, plain_model(model))
    messages = [record.getMessage() for record in caplog.records if record.name == "distillkit.generators.decoding"]
    assert messages == ["RwkvForCausalLM generates without a cache, which is slower: its layers take no cache"]


class Forgetful(DynamicLayer):
    """A cache that loses the earlier keys, as one that vanishes in `**kwargs` does."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys[:, :, -1:], values[:, :, -1:]
        return keys, values


def test_a_cache_that_forgets_is_not_used(monkeypatch):
    monkeypatch.setattr(kv_cache, "PreallocatedLayer", Forgetful)
    model = made(LlamaForCausalLM, LlamaConfig, vocab_size=64)
    assert cache_use(model) == "none"
    check_generation(model, plain_model(model))


def test_rows_of_a_cache_that_does_not_follow_its_rows_are_not_used(monkeypatch):
    monkeypatch.setattr(kv_cache.PreallocatedLayer, "batch_select_indices", lambda self, indices: None)
    assert cache_use(made(LlamaForCausalLM, LlamaConfig)) == "none"


@pytest.mark.parametrize("name", ["llama", "lfm2", "mamba2"])
def test_a_copy_in_another_type_is_tried_by_itself(name, monkeypatch):
    monkeypatch.setattr("distillkit.generators.transformers.fast_dtype", lambda dtype, device: dtype)
    generator = TransformersGenerator(dtype="bfloat16", progress=False)
    generator.refresh(tiny_family(name), Ids())
    assert cache_use(generator._model) == "padded"
    assert next(generator._model.parameters()).dtype == torch.bfloat16


class Ids:
    eos_token_id, chat_template = 1, None

    def get_vocab(self):
        return {str(index): index for index in range(64)}
