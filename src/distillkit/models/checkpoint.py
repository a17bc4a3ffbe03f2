"""Checkpoints read through transformers: without progress bars, complete, and with one-line errors."""

import logging
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from distillkit.errors import DistillKitError, ModelError
from distillkit.models.finite import tensors_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# struct.error: a truncated GGUF file; SafetensorError: a truncated .safetensors file.
_EXPECTED = (OSError, ValueError, ImportError, struct.error, SafetensorError)
"""Errors whose message says enough."""

_NO_CAUSAL_MODEL = re.compile(r"Unrecognized configuration class <class '[\w.]*?(\w+?)(?:Config)?'>.*ForCausalLM")


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and load reports of transformers, and restores its settings afterwards.

    One bar remains, which transformers offers no switch for: the unpacking of a GGUF file, once per file.
    """
    # Imported here: transformers takes a second, and the command line must start without it.
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(source: str, item: str) -> Iterator[None]:
    """Turns the errors that transformers raises for an unreadable checkpoint into a `ModelError`.

    Args:
        source: The checkpoint as the user named it.
        item: The part being read, such as `model` or `tokenizer`.
    """
    try:
        yield
    except DistillKitError:
        raise
    except Exception as error:  # a damaged folder leads to errors of any type, in transformers and below it
        message = " ".join(str(error).split())
        if not isinstance(error, _EXPECTED):
            message = f"{type(error).__name__}: {message}"
        if "trust_remote_code" in message:
            raise ModelError(
                f"{source} comes with Python code of its own, which its {item} needs. Read that code; if you trust it, "
                "set `trust_remote_code: true` beside the source, and permit it (DISTILLKIT_ALLOW=remote_code)."
            ) from error
        if "connect to" in message and not Path(source).exists():
            message += f" There is no folder {source} either: correct the path if it is one."
        if isinstance(error, UnpicklingError):
            raise ModelError(
                f"{source}: the {item}'s weights are in a .bin file that holds more than tensors, which could run code "
                "and is not read. Save the model as safetensors."
            ) from error
        if type(error).__name__.startswith("StrictDataclass"):  # a setting of another type than transformers expects
            item = "config"
        if "has been toggled on" in message:  # an attention implementation that the config names
            message += " Set `attn_implementation: sdpa` beside the source."
        if "tiktoken" in message:  # which transformers names for files of SentencePiece too
            message += " It reads a tokenizer.model of SentencePiece if sentencepiece is installed."
        if match := _NO_CAUSAL_MODEL.search(message):
            raise ModelError(
                f"{source} is a {match[1]} model, of which transformers has no causal language model "
                "(AutoModelForCausalLM). Name a decoder of text; that of a model which also sees or hears must be "
                "saved as a model of its own."
            ) from error
        raise ModelError(f"{source}: the {item} can't be loaded. transformers says: {message}") from error


def read_model(folder: str, source: str, dtype: torch.dtype, **options: object) -> "PreTrainedModel":
    """Reads a causal language model onto the CPU, in eval mode.

    Args:
        folder: Hub id or folder, as transformers' `from_pretrained` takes it.
        source: The model as the user named it, for error messages.
        dtype: Type of the parameters. The rotary frequencies stay in float32, which `model.to(dtype)` would convert.
        options: Further arguments of `from_pretrained`.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: If it can't be read, its tensors do not match its config exactly, one is not finite, or an adapter
            lies beside it.
    """
    from transformers import AutoModelForCausalLM  # here, for a fast start: see `quiet`

    # transformers asks on standard input whether code of the model may run, unless it is told.
    arguments = {"trust_remote_code": False} | options
    with quiet(), explained(source, "model"):
        # Shapes are compared below, where the error can name the source and be one line.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has put an adapter on it and frozen the rest
        raise ModelError(
            f"{source} is an adapter (it has an adapter_config.json). Download it, and name a folder with nothing but "
            "the adapter: it is then merged into its base model."
        )
    saved_class = _other_class(model)
    _require_complete(info, source, saved_class)
    if saved_class is not None and _NO_HEAD.search(saved_class):
        _log.warning(
            "%s was saved from a %s, which predicts no next token: its input embeddings serve as the output head.",
            source,
            saved_class,
        )
    _require_finite(model, source)
    _unset_outputs(model)
    _forget_unpacking(model)
    return model


_NO_HEAD = re.compile(r"(Classification|Answering|(?<!LMHead)(?<!DoubleHeads)Model)$")
"""Ends of the names of classes without the output head of a causal language model."""


def _other_class(model: "PreTrainedModel") -> str | None:
    """The class that the checkpoint was saved from, if its config names another one than that which was loaded."""
    architectures = getattr(model.config, "architectures", None)  # not always a list of names
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    return next((name for name in names if name != type(model).__name__), None)


def _unset_outputs(model: "PreTrainedModel") -> None:
    """Resets settings of the config that change what a forward pass returns, not what it computes."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.return_dict = True
        config.output_hidden_states = False
        if config.output_attentions:  # which no attention implementation but eager can return
            config.output_attentions = False


def _forget_unpacking(model: "PreTrainedModel") -> None:
    """Makes a model whose quantised weights were unpacked save them as they are in memory.

    transformers quantises them again (FP8), and the config then does not say so.
    """
    if getattr(model, "is_quantized", False):
        return
    conversions = getattr(model, "_weight_conversions", None) or []
    operations = [operation for conversion in conversions for operation in getattr(conversion, "operations", [])]
    if any(hasattr(operation, "hf_quantizer") for operation in operations):
        del model._weight_conversions


def read_tokenizer(folder: str, source: str, **options: object) -> "PreTrainedTokenizerBase":
    """Reads a tokenizer, which tokenises text as its `tokenizer.json` says, and in the same way at each call.

    Some classes of transformers build rules of their own and take the vocabulary alone from the file: a byte-level one
    whose class is `LlamaTokenizerFast`, as in DeepSeek's distilled Llamas, then loses every space.

    Args:
        folder: Hub id or folder, as transformers' `from_pretrained` takes it.
        source: The model as the user named it, for messages.
        options: Further arguments of `from_pretrained`.

    Returns:
        A transformers tokenizer, without BPE dropout.

    Raises:
        ModelError: If it can't be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # here, for a fast start: see `quiet`

    with quiet(), explained(source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
        file = Path(folder) / "tokenizer.json"
        if type(tokenizer) is not PreTrainedTokenizerFast and file.is_file() and not _tokenises_as(tokenizer, file):
            _log.warning(
                "%s: transformers' %s does not tokenise text as tokenizer.json says, which is used instead.",
                source,
                type(tokenizer).__name__,
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None for one in Python
    if getattr(getattr(backend, "model", None), "dropout", None):
        backend.model.dropout = None  # type: ignore[union-attr]
    return tokenizer


_SAMPLES = ("Two words, and  12 + 345:", "it's {x}\n\n\tdone", "über, 中文 é")


def _tokenises_as(tokenizer: "PreTrainedTokenizerBase", file: Path) -> bool:
    """True if some texts have the tokens that a `tokenizer.json` gives them, and for a tokenizer in Python."""
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return True
    stored = Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    return all(
        tokenizer(text, add_special_tokens=False)["input_ids"] == stored.encode(text, add_special_tokens=False).ids
        for text in _SAMPLES
    )


def _require_finite(model: nn.Module, source: str) -> None:
    broken = tensors_not_finite(model)
    if broken:
        raise ModelError(
            f"{source}: its tensor {broken[0]} has entries that are NaN or infinite. Save the model again from a "
            "checkpoint whose loss was finite."
        )


def write_model(model: nn.Module, folder: Path, **arguments: object) -> None:
    """Writes a model with `save_pretrained`, quietly, and lets others read its files.

    Args:
        model: A transformers model, or one that peft has wrapped.
        folder: Target folder.
        arguments: Further arguments of `save_pretrained`.
    """
    with quiet():
        model.save_pretrained(folder, **arguments)  # type: ignore[operator]
    share_files(folder)


def share_files(folder: Path) -> None:
    """Gives each file of a folder the permissions that new files have (the umask's).

    safetensors creates its files for their owner alone, so that a server under another user could not read them.
    """
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


_MASKS = re.compile(r"\.(attn|attention)\.((masked_)?bias|causal_mask)$")
"""Causal masks, which transformers once saved with GPT-2, GPT-Neo, GPT-J and CodeGen, and now makes itself."""


def _require_complete(
    info: Mapping[str, Iterable[str | tuple[str, ...]]], source: str, saved_class: str | None = None
) -> None:
    for key, words in (
        ("mismatched_keys", "in other shapes than"),
        ("missing_keys", "missing although"),
        ("unexpected_keys", "not among those that"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in info[key])
        if key == "unexpected_keys":
            names = [name for name in names if not _MASKS.search(name)]
        if names:
            hint = f" It was saved from a {saved_class}, which may be no causal language model." if saved_class else ""
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{source}: {len(names)} of its tensors are {words} its config asks for them: {shown}. "
                f"Check that config.json and the weights belong together.{hint}"
            )
