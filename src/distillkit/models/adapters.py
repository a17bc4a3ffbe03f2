"""Low-rank adapters: their settings, the layers that get one, and a report of those that don't."""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distillkit.errors import ConfigError
from distillkit.models.adaptable import is_linear, unadaptable
from distillkit.models.capabilities import probe_tokens
from distillkit.models.heads import summary
from distillkit.models.merging import adapts_tied_embeddings
from distillkit.models.structure import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"

_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_READ_BY_KERNELS = ("out_proj", "conv1d")
"""Layers of these models whose weights a kernel reads on a GPU, so that peft refuses adapters on them."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the only parameters that are trained (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: Rank of each update, at least 1.
        alpha: Scale of the update, which is multiplied by alpha / r; above 0.
        dropout: Probability with which an adapter's input is dropped, in [0, 1).
        target_modules: Names of the linear layers that get an adapter, or a regular expression for them;
            `all-linear` is every linear layer of the language model except the output head.

    Raises:
        ConfigError: If a value is outside its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"Lora.r must be at least 1, got {self.r}.")
        if not self.alpha > 0:
            raise ConfigError(f"Lora.alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"Lora.dropout must lie in [0, 1), got {self.dropout}.")
        if not self.target_modules:
            raise ConfigError("Lora.target_modules is empty. Name some linear layers, or use all-linear.")


def add_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """Puts adapters on a model, which is frozen apart from them; the log says which layers have none.

    Args:
        model: A transformers causal language model.
        lora: Settings of the adapters.

    Returns:
        The model, wrapped by peft.

    Raises:
        ConfigError: If `target_modules` names layers that the model doesn't have or that can't have an adapter, or if
            the adapters would get no gradient.
    """
    from peft import LoraConfig, get_peft_model  # here, for a fast start of the command line

    all_linear = isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR
    refused = unadaptable(base_model(model))
    excluded = sorted(_left_out(base_model(model)) | refused.keys()) if all_linear else []
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM",
    )
    architecture, names = type(base_model(model)).__name__, ", ".join(_linear_names(model))
    with warnings.catch_warnings():
        # About tied embeddings, which `merge_lora` separates; names that match nothing are an error below.
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings.*|.*fan_in_fan_out.*|.*_pattern keys.*")
        try:
            adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"Lora.target_modules: {lora.target_modules} can't be adapted in {architecture}, whose linear layers "
                f"are {names}. peft says: {reason}"
            ) from error
    layers = list(_adapted_layers(adapted))
    unmatched = [] if all_linear else _unmatched(config.target_modules, layers)
    if unmatched:
        raise ConfigError(
            f"Lora.target_modules: {architecture} has no {', '.join(unmatched)}. Its linear layers are {names}."
        )
    _require_adaptable(architecture, refused, layers)
    _require_gradient(adapted)
    if adapts_tied_embeddings(adapted):
        _require_separable(base_model(adapted))
    _report(adapted, layers, excluded, all_linear)
    return adapted


def _unmatched(names: object, layers: Iterable[str]) -> list[str]:
    """The names that no adapted layer has; peft has removed those that it translated to fused parameters."""
    remaining = names if isinstance(names, set) else set[str]()
    return sorted(name for name in remaining if not any(f".{layer}".endswith(f".{name}") for layer in layers))


def _left_out(model: "PreTrainedModel") -> set[str]:
    """The linear layers outside the language model, and those that peft refuses; the output head is peft's to leave."""
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    language = {id(module) for module in model.get_decoder().modules()}
    head = model.get_output_embeddings()
    outside = {name for name, module in linear.items() if id(module) not in language and module is not head}
    if model.config.model_type not in _MAMBA:
        return outside
    return outside | {name for name in linear if name.rpartition(".")[2] in _READ_BY_KERNELS}


def _require_adaptable(architecture: str, refused: Mapping[str, str], layers: Iterable[str]) -> None:
    """Checks that no layer has an adapter on which it would do nothing, fail, or be lost when it is merged.

    Args:
        architecture: Name of the model's class.
        refused: Such layers by name, each with the reason.
        layers: The layers with an adapter.

    Raises:
        ConfigError: If one has.
    """
    for reason in dict.fromkeys(refused.values()):
        names = sorted({name.rpartition(".")[2] for name in layers if refused.get(name) == reason})
        if names:
            raise ConfigError(f"Lora.target_modules: {architecture} {reason.format(', '.join(names))}. Leave it out.")


def _require_gradient(model: nn.Module) -> None:
    """Checks by a pass in training mode that the adapters get a gradient although the weights get none.

    Raises:
        ConfigError: If the pass fails, or its result depends on no adapter.
    """
    architecture, training = type(base_model(model)).__name__, model.training
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            result: Tensor = model.train()(input_ids=probe_tokens(model, 4)[None], use_cache=False).logits
    except Exception as error:  # the code of any architecture: it may raise anything
        raise ConfigError(
            f"Student.lora can't be used with {architecture}: a test pass fails with {summary(error)}. Leave it out."
        ) from error
    finally:
        model.train(training)
    if not result.requires_grad:
        raise ConfigError(
            f"Student.lora can't be used with {architecture}, whose own backward pass gives adapters no gradient. "
            "Leave it out."
        )


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})


def _adapted_layers(model: nn.Module) -> Iterator[str]:
    """The names of the layers with an adapter; a parameter of several fused layers counts as one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in base_model(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield _weight_name(name, getattr(module, "parameter_name", "weight"))


def _require_separable(model: "PreTrainedModel") -> None:
    """Checks that the architecture can have an output embedding apart from its input embedding.

    Raises:
        ConfigError: If it always ties them.
    """
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    with torch.device("meta"):
        separate = type(model)(config)
    if separate.get_input_embeddings().weight is separate.get_output_embeddings().weight:
        raise ConfigError(
            f"Lora.target_modules names an embedding, and {type(model).__name__} always ties its two embeddings: the "
            "merged model would differ from the trained one. Leave the embeddings out."
        )
    _log.info(
        "Student.lora adapts one of two tied embeddings: in the merged model they are separate, so it has one more "
        "matrix of %d x %d.",
        *separate.get_output_embeddings().weight.shape,
    )


def _report(model: nn.Module, layers: Iterable[str], excluded: Iterable[str], all_linear: bool) -> None:
    """Logs which layers have an adapter and, for `all-linear`, which that multiply matrices have none."""
    names = set(layers)
    left_out: Counter[str] = Counter()
    body = base_model(model).get_decoder()
    for module_name, module in body.named_modules() if all_linear else ():
        if isinstance(module, nn.Embedding) or "lora_" in module_name or "Conv1d" in type(module).__name__:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = _weight_name(module_name, parameter_name)
            like_linear = parameter.dim() == 3 or (parameter.dim() == 2 and parameter_name == "weight")
            if like_linear and not any(f".{layer}".endswith(f".{name}") for layer in names):
                left_out[name.rpartition(".")[2]] += 1
    inside = {id(module) for module in body.modules()}
    outside = sum(id(base_model(model).get_submodule(name)) not in inside for name in excluded)
    notes = [f"{count} {name}" for name, count in sorted(left_out.items())]
    notes += [f"{outside} linear layers outside the language model"] if outside else []
    taken = Counter(name.rpartition(".")[2] for name in names)
    _log.info(
        "Student.lora: adapters on %s%s.",
        ", ".join(f"{count} {name}" for name, count in sorted(taken.items())),
        f"; left out: {', '.join(notes)}" if notes else "",
    )


def _weight_name(module: str, parameter: str) -> str:
    """The name of a linear layer, or of a parameter that is used like one."""
    module = module.replace(".base_layer", "")
    return module if parameter == "weight" else f"{module}.{parameter}"
