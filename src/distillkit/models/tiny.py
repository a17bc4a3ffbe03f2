"""Tiny model and tokenizer for tests and for trying the command, created in memory; nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
START_ID, END_ID = 0, 1

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = """
What is the capital of France? The capital of France is Paris, a city on the Seine.
Write one sentence about the sea. The sea is wide, and the wind moves over the water.
How many days has a week? A week has seven days: five to work and two to rest.
system user assistant Tell me a short story. Once upon a time there was a small model that learned from a large one.
"""


def tiny_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML, which encodes any text. Ids: <|im_start|> 0, <|im_end|> 1 (end and pad).

    Args:
        vocab: Maximum number of tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    vocab: int = 320, layers: int = 2, hidden: int = 32, seed: int = 0, **config: object
) -> LlamaForCausalLM:
    """A random Llama in eval mode. Its weights depend on `seed` only; the global random state does not change.

    Args:
        vocab: V, width of the logits.
        layers: Number of decoder layers.
        hidden: D, hidden width, divisible by 4.
        seed: Seed of the weights.
        config: Further settings of the LlamaConfig.
    """
    settings: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        # No pad id: transformers would zero its embedding and stop its gradient.
        "pad_token_id": None,
        # Wide enough that predictions differ clearly between tokens and between seeds.
        "initializer_range": 0.2,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()
