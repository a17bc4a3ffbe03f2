"""Export of a trained model: it is written beside its folder, read back and compared, and only then put there.

Letters: B rows, T tokens, V vocabulary.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distillkit.divergences import kl
from distillkit.errors import ConfigError, ModelError, StoreError
from distillkit.models.checkpoint import explained, quiet, read_model, share_files, write_model
from distillkit.models.equality import SAME_ARITHMETIC, differs, gap, logits, rounding_tolerance
from distillkit.models.generation_config import exportable
from distillkit.models.merging import merge_lora
from distillkit.models.options import SourceOptions
from distillkit.models.sources import prepare
from distillkit.models.structure import base_model
from distillkit.models.student import Student
from distillkit.models.tokenizers import eos_ids
from distillkit.storage.atomic import sync
from distillkit.types import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_UNFINISHED = ".unfinished-export"
_EXPORTED = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|(adapter_)?config\.json")
"""Files of an earlier export that would be read together with a new one."""


def export_model(
    model: nn.Module,
    student: Student,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter_only: bool = False,
    files: Mapping[str, str] | None = None,
) -> float:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`, once it is sure to hold the trained model.

    It holds safetensors (a LoRA adapter merged), tokenizer, chat template and generation config.

    Args:
        model: The trained model, with LoRA adapters or without; its weights are not changed.
        student: The settings that it was loaded with.
        tokenizer: The tokenizer to store.
        folder: Target folder, which is created if it does not exist.
        dtype: Type of the stored weights; None is the type in which the student's source stores its weights.
        adapter_only: Whether the LoRA adapter alone is written, in the type that it was trained in.
        files: Further text files, by name.

    Returns:
        KL(trained‖stored) on a few rows, in nats per token: the effect of rounding.

    Raises:
        ModelError: If the model that would be reloaded differs from the trained one, or can't be saved.
    """
    generation_config, _ = exportable(base_model(model), eos_ids(tokenizer, base_model(model)), student.source)
    divergence = 0.0
    with staged(folder) as temporary:
        if adapter_only:
            write_adapter(model, temporary, student.load_base)
        else:
            dtype = stored_dtype(student.source, student.options) if dtype is None else dtype
            divergence = write_merged(model, temporary, dtype, generation_config, student.options)
        with quiet():
            tokenizer.save_pretrained(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text)
        share_files(temporary)
    return divergence


def check_export(model: nn.Module, student: Student, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Saves everything but the weights of a model to a folder that is removed again, before it is trained.

    Args:
        model: The model, with LoRA adapters or without.
        student: The settings that it was loaded with.
        tokenizer: The tokenizer to store.
        folder: The folder that is to be written.

    Returns:
        Settings of the generation config that have no effect, which the export leaves out.

    Raises:
        ConfigError: If the folder can't be written.
        ModelError: If the generation config has a fault.
    """
    base = base_model(model)
    generation_config, removed = exportable(base, eos_ids(tokenizer, base), student.source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        parent = folder if folder.is_dir() else folder.parent
        with quiet(), tempfile.TemporaryDirectory(dir=parent, prefix=".try-") as name:
            base.config.save_pretrained(name)
            generation_config.save_pretrained(name)
            tokenizer.save_pretrained(name)
    except Exception as error:
        if not (reason := _refusal(error)):
            raise
        raise ConfigError(f"Export.folder: {folder} can't be written ({reason}). Choose another folder.") from error
    return removed


def check_adapter_only(student: Student, setting: str) -> None:
    """Refuses to export the adapter alone of a student whose adapter fits no source.

    Args:
        student: The student's settings.
        setting: The setting that asks for it, as the user writes it.

    Raises:
        ConfigError: If the student has no adapter, or fewer layers than its source.
    """
    if student.lora is None:
        raise ConfigError(
            f"{setting} needs adapters (model.student.lora), and the student has none. Leave it out to export the "
            "whole model."
        )
    if student.keep_layers is not None:
        raise ConfigError(
            f"{setting} can't be used with model.student.keep_layers: the adapter would not fit the source, which has "
            "all layers. Leave it out."
        )


def _refusal(error: Exception) -> str:
    """The reason of an error of the operating system; empty for any other error.

    The libraries in Rust raise an exception of any type then, with the system's error number in its text.
    """
    if isinstance(error, OSError):
        return error.strerror or ""
    match = _OS_ERROR.search(str(error))
    return os.strerror(int(match[1])) if match else ""


def stored_dtype(source: str, options: SourceOptions) -> torch.dtype:
    """The type in which a source stores its weights; float32 if nothing says it.

    Args:
        source: A model source.
        options: Revision, and whether the model's own code may run.

    Raises:
        ModelError: If its config can't be read.
    """
    from transformers import AutoConfig  # here, for a fast start of the command line

    folder = prepare(source, options)
    with quiet(), explained(source, "config"):
        config = AutoConfig.from_pretrained(folder, **options.as_arguments())
    named = [getattr(part, "dtype", None) for part in (config, config.get_text_config(decoder=True))]
    dtypes = (dtype for dtype in chain(named, _tensor_dtypes(Path(folder))) if isinstance(dtype, torch.dtype))
    # Not the types of masks and counters, and of quantised weights, which are none without their scales
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def _tensor_dtypes(folder: Path) -> Iterator[torch.dtype]:
    """Types of the tensors in a folder's safetensors; a hub id has none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                yield tensors.get_tensor(name).dtype


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, whose content is put into `folder` if the block ends without an error.

    Files of an earlier export are replaced, and its other weight files removed; anything else in `folder` stays.

    Args:
        folder: Target folder; it need not exist.

    Raises:
        StoreError: If the operating system refuses a write, for example because the disk is full.
    """
    try:
        with _staged(folder) as temporary:
            yield temporary
    except Exception as error:
        if not (reason := _refusal(error)):
            raise
        raise StoreError(
            f"{folder} can't be written ({reason}). Make room, or choose a folder that can be written, and run the "
            "same command again."
        ) from error


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    parent = folder if folder.is_dir() else folder.parent
    temporary = parent / f"{_UNFINISHED}-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if not folder.is_dir():
            os.replace(temporary, folder)
            return
        new = {path.name for path in temporary.iterdir()}
        for path in temporary.iterdir():
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
        for path in folder.iterdir():
            if path.name not in new and _EXPORTED.fullmatch(path.name):
                path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_merged(
    student: nn.Module, folder: Path, dtype: torch.dtype, generation_config: "GenerationConfig", options: SourceOptions
) -> float:
    """Writes a model with its adapters merged, reads it back and compares it with the trained one.

    Args:
        student: The trained model, with adapters or without.
        folder: An empty folder.
        dtype: Type in which the weights are stored.
        generation_config: The generation config to store.
        options: Whether the model's own code may run when it is read back.

    Returns:
        KL(trained‖stored) on a few rows, in nats per token: the effect of rounding to `dtype`.

    Raises:
        ModelError: If the merged or the stored model differs from the trained one by more than rounding.
    """
    trained = _finite_logits(student)
    model = base_model(merge_lora(student))
    merged = trained if model is student else logits(model)
    _require_equal(merged, trained, rounding_tolerance(model.dtype), "with its adapters merged")
    model.generation_config = generation_config
    state = _cast(model, dtype)
    write_model(model, folder, state_dict=dict(state))  # transformers removes entries
    _set_dtype(folder / "config.json", dtype)
    arguments: dict[str, object] = {"attn_implementation": model.config._attn_implementation}
    again = read_model(
        str(folder), "the exported student", model.dtype, trust_remote_code=options.trust_remote_code, **arguments
    ).to(model.device)
    stored = again.state_dict()
    wrong = [name for name, tensor in state.items() if not torch.equal(stored[name], tensor.to(stored[name].dtype))]
    if wrong:
        raise ModelError(f"{_NOT_EXPORTED} Of its tensors {len(wrong)} are reloaded with other values: {wrong[0]}, …")
    rounded = logits(again)
    again.load_state_dict(model.state_dict())
    # With the weights of the trained model, so that rounding to `dtype` hides nothing
    _require_equal(logits(again), merged, SAME_ARITHMETIC, "as transformers reloads it")
    return float(kl(trained.log_softmax(-1), rounded.log_softmax(-1)).mean())


def write_adapter(student: nn.Module, folder: Path, load_base: Callable[[], nn.Module]) -> None:
    """Writes a model's adapter alone, puts it on the base model again and compares that with the trained one.

    Args:
        student: The trained model, with adapters.
        folder: An empty folder.
        load_base: Loads the base model.

    Raises:
        ModelError: If the base model with the stored adapter differs from the trained model.
    """
    from peft import PeftModel  # here, for a fast start of the command line

    trained = _finite_logits(student)
    write_model(student, folder)
    again = PeftModel.from_pretrained(load_base(), folder).to(base_model(student).device)
    _require_equal(logits(again), trained, rounding_tolerance(base_model(student).dtype), "with its stored adapter")


_NOT_EXPORTED = "The student was not exported; its weights are in the run's checkpoints."


def _finite_logits(student: nn.Module) -> Tensor:
    """Logits `[B, T, V]` of the trained model.

    Raises:
        ModelError: If some are not numbers.
    """
    trained = logits(student)
    if not bool(trained.isfinite().all()):
        raise ModelError("The student was not exported: its logits are not finite, so training has diverged.")
    return trained


def _require_equal(current: Tensor, trained: Tensor, tolerance: float, state: str) -> None:
    """Compares the logits `[B, T, V]` of a model in some state with those of the trained one."""
    if differs(current, trained, tolerance):
        raise ModelError(
            f"{_NOT_EXPORTED} Its logits {state} differ from those of the trained model by "
            f"{gap(current, trained):.3g} of their norm."
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state dict in another type; weights that are tied in the model are one tensor here too."""
    tensors = model.state_dict(keep_vars=True)
    cast = {
        id(tensor): tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        for tensor in tensors.values()
    }
    return {name: cast[id(tensor)] for name, tensor in tensors.items()}


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    """Names the type of the stored weights in a config file, which has that of the model in memory."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config") or {}):
        part |= {"dtype": str(dtype).removeprefix("torch.")} if "dtype" in part else {}
    file.write_text(json.dumps(config, indent=2) + "\n")
