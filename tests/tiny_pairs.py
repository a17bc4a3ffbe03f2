"""A teacher and a student that agree in part, as a pair of one family does, and a tokenizer of six words."""

import copy

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

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
