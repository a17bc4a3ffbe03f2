"""Reading a checkpoint through transformers: quietly, completely, and with failures of one line."""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from distillkit.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and load reports of transformers, and leaves its settings as they were.

    One bar stays, which transformers gives no switch for: the unpacking of a GGUF file, once per file.
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
def explained(source: str, what: str) -> Iterator[None]:
    """Turns the errors that transformers raises for a checkpoint it can't read into a `ModelError`.

    Args:
        source: The checkpoint as the user named it.
        what: What is being read, such as `model`.
    """
    try:
        yield
    # struct.error is a GGUF file that ends too early, SafetensorError a .safetensors file that does.
    except (OSError, ValueError, ImportError, struct.error, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{source}: the {what} can't be loaded. transformers says: {said}") from error


def read_model(folder: str, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """Reads a causal language model, on the CPU and in eval mode.

    Args:
        folder: What transformers' `from_pretrained` takes: a hub id or a folder.
        source: The same as the user named it, for errors.
        dtype: Type of the parameters. The rotary frequencies stay in float32, which `model.to(dtype)` would not give.
        options: Further arguments of `from_pretrained`.

    Returns:
        A transformers causal language model.

    Raises:
        ModelError: If it can't be read, or its tensors are not exactly those that its config asks for.
    """
    from transformers import AutoModelForCausalLM  # here, for a fast start: see `quiet`

    with quiet(), explained(source, "model"):
        # Shapes are compared below, where the error can name the source and be one line.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _require_complete(info, source)
    return model


def _require_complete(info: Mapping[str, Any], source: str) -> None:
    for key, words in (
        ("mismatched_keys", "in other shapes than"),
        ("missing_keys", "missing although"),
        ("unexpected_keys", "not among those that"),
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in info[key])
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{source}: {len(names)} of its tensors are {words} its config asks for them: {shown}. "
                "Check that config.json and the weights belong together."
            )
