"""A teacher and a student that agree in part, as a pair of one family does, and a tokenizer of six words."""

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from distillkit.types import Prompt, Prompts
from helpers.models import END_ID

WORDS = ("end", "a", "b", "c", "d", "e")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Six words; the first ends a turn."""
    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[1])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token=WORDS[0], pad_token=WORDS[0])


def near(model: nn.Module, distance: float = 0.3, seed: int = 7) -> nn.Module:
    """A copy whose matrices have noise of `distance` times their own standard deviation."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter += distance * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def pair(student: nn.Module, teacher: nn.Module) -> nn.ModuleDict:
    """Both, as a generator gets them."""
    return nn.ModuleDict({"student": student, "teacher": teacher})


def gemma2(vocab: int) -> Gemma2ForCausalLM:
    """A random Gemma 2 whose every other layer sees four tokens back."""
    config = Gemma2Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def prompts_of(vocab: int, lengths: Sequence[int] = (3, 11, 1, 7, 7, 2, 16), round_index: int = 0) -> Prompts:
    """Prompts p0, p1, ... of these lengths, of random tokens that end no turn."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]
    return Prompts(tuple(Prompt(f"p{i}", (), tuple(row)) for i, row in enumerate(rows)), round_index)
