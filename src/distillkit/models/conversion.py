"""Conversion of other formats to transformers folders: GGUF files, and adapters on a base model."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distillkit.errors import ModelError
from distillkit.models.checkpoint import explained, quiet, read_model, read_tokenizer, share_files, write_model
from distillkit.models.equality import differs, gap, logits, rounding_tolerance
from distillkit.models.merging import merge_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

VERSION = 3
"""Version of the conversions. It is part of the name of a cached folder, so that older ones are not used."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder is recognised as a peft adapter."""

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def convert_gguf(file: Path, source: str, folder: Path) -> None:
    """Converts a GGUF file to a transformers folder in float32.

    Args:
        file: The GGUF file.
        source: The file as the user named it, for error messages.
        folder: Target folder.

    Raises:
        ModelError: If the file can't be read.
    """
    from transformers import AutoTokenizer, GgufConfig  # here, for a fast start of the command line

    parent, name = str(file.parent), file.name
    with quiet(), explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name)
        flags = _gguf_values(file, "add_bos_token", "add_eos_token", "eot_token_id")
    _apply_flags(tokenizer, flags)
    # Without dequantize the weights stay packed, and save_pretrained refuses them.
    unpack = GgufConfig(dequantize=True)
    model = read_model(parent, source, torch.float32, gguf_file=name, quantization_config=unpack)
    end_ids = {model.generation_config.eos_token_id, flags.get("eot_token_id")} - {None}
    if len(end_ids) > 1:  # the end of a turn, where it is another token than the end of the text
        model.generation_config.eos_token_id = sorted(end_ids)
    write_model(model, folder)
    with quiet():
        tokenizer.save_pretrained(folder)
    share_files(folder)


def _gguf_values(file: Path, *names: str) -> dict[str, int]:
    """The tokenizer's entries of these names in a GGUF file's metadata; only those that it has."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    keys = {name: f"tokenizer.ggml.{name}" for name in names}
    return {name: fields[key].contents() for name, key in keys.items() if key in fields}


def _apply_flags(tokenizer: "PreTrainedTokenizerBase", flags: dict[str, int]) -> None:
    """Sets whether the tokenizer adds a first and a last token to a text, which transformers does not read."""
    if "add_bos_token" in flags:
        tokenizer.add_bos_token = bool(flags["add_bos_token"]) and tokenizer.bos_token is not None
    if "add_eos_token" in flags:
        tokenizer.add_eos_token = bool(flags["add_eos_token"]) and tokenizer.eos_token is not None


def adapter_base(folder: Path) -> str:
    """The source of the model that an adapter was trained on.

    Args:
        folder: Folder with `adapter_config.json`.

    Raises:
        ModelError: If the adapter's configuration can't be read or names no base model.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        base = config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} is not a JSON object ({error}): write or copy it again."
        ) from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} does not name the adapter's base model: set its base_model_name_or_path."
        )
    return base


def convert_adapter(adapter: Path, base: str, source: str, folder: Path, **options: object) -> None:
    """Merges an adapter into its base model, in float32, and saves a transformers folder.

    Args:
        adapter: Folder with `adapter_config.json` and the adapter's weights.
        base: The base model, as transformers' `from_pretrained` takes it.
        source: The adapter as the user named it, for error messages.
        folder: Target folder.
        options: Further arguments of `from_pretrained` for the base model.

    Raises:
        ModelError: If the base model or the adapter can't be read, or the adapter is not of a kind that can be merged,
            or merging changes it.
    """
    from peft import PeftModel  # slow import

    if not any((adapter / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ModelError(f"{source} has an {ADAPTER_CONFIG} and no {_ADAPTER_WEIGHTS[0]}: copy the adapter's weights.")
    model = read_model(base, f"{source}, base model {base}", torch.float32, **options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, adapter)
    # RuntimeError: weights of other shapes than the base model's; TypeError, KeyError: unknown or missing settings.
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        message = " ".join(str(error).split())
        raise ModelError(
            f"{source}: the adapter can't be put on its base model {base}. peft says: {message}"
        ) from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = str(adapted.peft_config["default"].peft_type).rpartition(".")[2]
        raise ModelError(f"{source} is an adapter of the kind {kind}, which can't be merged into a model. Use LoRA.")
    _require_adapter_complete(adapted, adapter, source, base)
    trained = logits(adapted)
    try:
        merged = merge_lora(adapted)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        raise ModelError(
            f"{source}: the adapter can't be merged into its base model {base}. peft says: {message}"
        ) from error
    if differs(logits(merged), trained, rounding_tolerance(torch.float32)):
        raise ModelError(
            f"{source}: merged into its base model {base}, the adapter gives another model (logits differ by "
            f"{gap(logits(merged), trained):.3g} of their norm). Use a model without an adapter."
        )
    write_model(merged, folder)
    tokenizer_folder = str(adapter) if (adapter / "tokenizer_config.json").is_file() else base
    tokenizer = read_tokenizer(tokenizer_folder, source, **options)
    with quiet():
        tokenizer.save_pretrained(folder)
    share_files(folder)


def _require_adapter_complete(adapted: "PeftModel", adapter: Path, source: str, base: str) -> None:
    """Checks that the adapter's file has the tensors that its configuration asks for and no others.

    peft leaves the adapter of a layer that the file lacks as it was created, without effect, and drops tensors of
    layers that the base model lacks.

    Raises:
        ModelError: If they are not the same.
    """
    from peft import load_peft_weights, set_peft_model_state_dict  # slow import

    result = set_peft_model_state_dict(adapted, load_peft_weights(str(adapter), device="cpu"))
    kinds = (str(adapted.base_model.prefix), "modules_to_save.")
    missing = [name for name in result.missing_keys if ".default" in name and any(kind in name for kind in kinds)]
    for names, words in ((missing, "missing although"), (list(result.unexpected_keys), "not among those that")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{source}: {len(names)} of the adapter's tensors are {words} its {ADAPTER_CONFIG} asks for them on "
                f"the base model {base}: {shown}. Check that adapter and base model belong together."
            )
