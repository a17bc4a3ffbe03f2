"""vLLM's engine in the process of a run: start and weight updates. vLLM is imported only when an engine starts."""

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from distillkit.devices import distributed
from distillkit.errors import ConfigError, ModelError
from distillkit.models.checkpoint import quiet
from distillkit.models.structure import base_model

if TYPE_CHECKING:
    from vllm import LLM

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it starts in seconds, weights need no pipe
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # torch's threads, not bound to single cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(name: str) -> None:
    """Checks that vLLM is installed, without importing it.

    Args:
        name: Class that needs vLLM, for the error.

    Raises:
        ConfigError: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f'{name} needs vLLM, which is not installed. On a GPU machine run pip install "distillkit[vllm]"; '
            "for a CPU see docs/models.md."
        )


def on_cpu() -> bool:
    """Returns True if an engine would run on the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def start(folder: str, options: Mapping[str, object], name: str) -> "LLM":
    """Starts an engine for the model in a folder; random states and thread settings of this process do not change.

    Args:
        folder: A transformers folder or a hub id.
        options: Arguments of vLLM's `LLM`.
        name: Class that starts the engine, for errors.

    Raises:
        ConfigError: If this process is one of several ranks.
        ModelError: If vLLM can't run the model with these options.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            f"{name} runs within one process, but this run has {distributed.world_size()} ranks. Use one rank, or "
            "TransformersGenerator."
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with undisturbed():
        from vllm import LLM  # takes seconds, and is optional

        try:
            return LLM(model=folder, **options)
        except (ValueError, RuntimeError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{name}: vLLM can't be started with {folder}. It reports: {reason}") from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restores random states and torch's threads afterwards: vLLM sets seeds, and on the CPU replaces a function."""
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)


def save(model: nn.Module, vocab: int, folder: Path) -> None:
    """Saves a transformers folder whose model has exactly `vocab` tokens, so that no others are generated.

    Args:
        model: A transformers causal language model without adapters.
        vocab: Tokens of the tokenizer; at most the model's own.
        folder: Target folder.
    """
    with quiet():
        base_model(model).save_pretrained(folder, state_dict=_tensors(model, vocab))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    changed = {"vocab_size": vocab} | ({"tie_word_embeddings": False} if on_cpu() else {})
    for part in (config, config.get("text_config") or {}):
        part |= {name: value for name, value in changed.items() if name in part}
    config |= {} if "tie_word_embeddings" in config or not on_cpu() else {"tie_word_embeddings": False}
    file.write_text(json.dumps(config, indent=2))


def checkpoint_tensors(model: nn.Module, vocab: int) -> list[tuple[str, Tensor]]:
    """The tensors that `save` would write, with their names in the file."""
    from transformers.core_model_loading import revert_weight_conversion  # a slow import

    return list(revert_weight_conversion(base_model(model), _tensors(model, vocab)).items())


def _tensors(model: nn.Module, vocab: int) -> dict[str, Tensor]:
    """The state dict with embeddings of `vocab` tokens; tied weights appear once, under their first name.

    On the CPU a tied output embedding gets a separate tensor: vLLM packs it at the start, and would not repack it when
    the input embedding that it is tied to is reloaded.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    embeddings = {id(module.weight) for module in (base.get_input_embeddings(), head)}
    visited: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in visited:  # with keep_vars tied weights are one object
            visited.add(id(tensor))
            tensors[name] = tensor.detach()[:vocab] if id(tensor) in embeddings else tensor.detach()
    name = next(f"{name}.weight" for name, module in base.named_modules() if module is head)
    if name not in tensors and on_cpu():
        tensors[name] = head.weight.detach()[:vocab].clone()
    return tensors


def update(llm: "LLM", model: nn.Module, vocab: int) -> None:
    """Loads a model's weights into a running engine, and clears the engine's prefix cache.

    Args:
        llm: A running engine, for a model of the same shape.
        model: A transformers causal language model without adapters.
        vocab: As in `save`.
    """
    if (
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        and llm.llm_engine.vllm_config.parallel_config.world_size == 1
    ):
        with undisturbed():
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_tensors(model, vocab)})
    else:  # tensors can't be passed to worker processes
        with tempfile.TemporaryDirectory(prefix="distillkit-vllm-") as folder:
            save(model, vocab, Path(folder))
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    llm.reset_prefix_cache()
