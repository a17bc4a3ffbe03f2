"""Tiny random models of several families, to be packed, generated with and exported."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers.batches import VOCAB

SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def made(model_class, config_class, **config):
    """A tiny model of random weights, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**SETTINGS | config)).eval()


MODELS = {
    "llama, grouped": lambda: made(LlamaForCausalLM, LlamaConfig),
    "llama, one key for all": lambda: made(LlamaForCausalLM, LlamaConfig, num_key_value_heads=1),
    "llama, a key for each": lambda: made(LlamaForCausalLM, LlamaConfig, num_key_value_heads=4),
    "qwen2, window in every layer": lambda: made(
        Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    "qwen2, window in the second layer": lambda: made(
        Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "gemma2 without a cap on scores": lambda: made(
        Gemma2ForCausalLM, Gemma2Config, head_dim=8, sliding_window=4, attn_logit_softcapping=None
    ),
    "gemma3": lambda: made(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: made(GPT2LMHeadModel, GPT2Config, n_layer=2, n_head=4, n_embd=32, n_positions=64),
}
