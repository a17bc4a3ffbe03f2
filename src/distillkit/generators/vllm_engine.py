"""Starting vLLM's engine within a run, and handing weights to it. vLLM is imported where it is started."""

import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillkit.errors import ConfigError, ModelError
from distillkit.models.checkpoint import quiet
from distillkit.models.scoring import base_model

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it starts in seconds, weights cross no pipe
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # torch's threads, not one core of those that there are
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(name: str) -> None:
    """Refuses to go on where vLLM is not installed, without importing it.

    Args:
        name: Who needs it.

    Raises:
        ConfigError: If it is missing.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f'{name} needs vLLM, which is not installed: pip install "distillkit[vllm]" on a GPU machine; '
            "docs/models.md says how on a CPU."
        )


def on_cpu() -> bool:
    """Whether an engine would run on the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is None or accelerator.type == "mps"


def start(folder: str, options: Mapping[str, Any], name: str) -> Any:
    """An engine for the model in a folder; this process keeps its random states and threads.

    Args:
        folder: A transformers folder or a hub id.
        options: Arguments of vLLM's `LLM`.
        name: Who starts it, for errors.

    Raises:
        ConfigError: If this process is one of several ranks.
        ModelError: If vLLM can't run the model, or not with these options.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError(
            f"{name} runs within one process, and this run has {torch.distributed.get_world_size()} ranks: use one "
            "rank, or TransformersGenerator."
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with undisturbed():
        from vllm import LLM  # takes seconds, and is optional

        try:
            return LLM(model=folder, **options)
        except (ValueError, RuntimeError, TypeError, ImportError) as error:
            said = " ".join(str(error).split())
            raise ModelError(f"{name}: vLLM can't be started with {folder}. It says: {said}") from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random states and torch's threads as they were: vLLM seeds everything, and on the CPU replaces a function."""
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
    """Writes a transformers folder whose model has exactly `vocab` tokens, so that no other is ever written.

    Args:
        model: A transformers causal language model without adapters.
        vocab: Tokens of the tokenizer; at most the model's own.
        folder: Where to.
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
    """The tensors that `save` would write, by the names that it would give them."""
    from transformers.core_model_loading import revert_weight_conversion  # here, for a fast start

    return list(revert_weight_conversion(base_model(model), _tensors(model, vocab)).items())


def _tensors(model: nn.Module, vocab: int) -> dict[str, Tensor]:
    """The state dict with embeddings of `vocab` tokens; of tied weights the first name.

    On the CPU an output embedding that is tied gets a tensor of its own: vLLM packs it at the start, and would not pack
    it anew when the embedding that it is tied to is loaded again.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    embeddings = {id(own.weight) for own in (base.get_input_embeddings(), head)}
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # with keep_vars tied weights are one object
            seen.add(id(tensor))
            found[name] = tensor.detach()[:vocab] if id(tensor) in embeddings else tensor.detach()
    name = next(f"{name}.weight" for name, module in base.named_modules() if module is head)
    if name not in found and on_cpu():
        found[name] = head.weight.detach()[:vocab].clone()
    return found


def update(llm: Any, model: nn.Module, vocab: int) -> None:
    """Puts a model's weights into a running engine; what it kept of earlier prompts is dropped.

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
    else:  # tensors don't cross to the worker processes
        with tempfile.TemporaryDirectory(prefix="distillkit-vllm-") as folder:
            save(model, vocab, Path(folder))
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    llm.reset_prefix_cache()
