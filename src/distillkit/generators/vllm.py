"""Generation with vLLM's engine in this process."""

import hashlib
import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from distillkit.errors import ConfigError
from distillkit.generators import vllm_engine
from distillkit.generators.progress import token_bar
from distillkit.interfaces import Generator
from distillkit.models.checkpoint import explained, quiet
from distillkit.models.fingerprint import fingerprint
from distillkit.models.loading import merge_lora
from distillkit.models.scoring import base_model, logits_width
from distillkit.models.sources import check, identity, prepare
from distillkit.models.tokenizers import eos_ids, load_tokenizer, require_same
from distillkit.types import Prompts, Response, Sampling

_log = logging.getLogger(__name__)

_OWN = ("model", "seed", "generation_config", "skip_tokenizer_init", "logprobs_mode", "speculative_config")
"""Arguments of the engine that are not the user's: others follow from settings or from what a response must be."""


@dataclass(frozen=True)
class Drafts:
    """Speculative decoding: tokens are drafted cheaply and checked by the writer, whose distribution stays as it is.

    Args:
        num_tokens: Tokens drafted at once, at least 1.
        draft: Folder of a small model of the writer's tokenizer, such as a student's export; None drafts n-grams that
            prompt and response have had before.
        max_ngram: Longest n-gram that is looked up, at least 1; read only without `draft`.

    Raises:
        ConfigError: If a number is below 1.
    """

    num_tokens: int = 4
    draft: str | None = None
    max_ngram: int = 4

    def __post_init__(self) -> None:
        for name, value in (("num_tokens", self.num_tokens), ("max_ngram", self.max_ngram)):
            if value < 1:
                raise ConfigError(f"Drafts.{name} must be at least 1, got {value}.")

    def as_config(self) -> dict[str, Any]:
        """The engine's `speculative_config`."""
        if self.draft is None:
            own: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": self.max_ngram, "prompt_lookup_min": 1}
        else:
            own = {"method": "draft_model", "model": prepare(self.draft)}
        return {"num_speculative_tokens": self.num_tokens, **own}


class VLLMGenerator(Generator):
    """Continues prompts with vLLM, whose engine starts when something is written first.

    It stays as long as the process does. New weights go into the running engine. Each response is drawn with a
    seed of its own, and comes with what the model says of its tokens.

    Args:
        source: A model of its own, of the run's tokenizer, in one of the forms of docs/models.md; None writes with the
            run's model.
        dtype: Type of the weights that write; None is the model's own.
        batch_size: Responses that are written at once, at least 1.
        max_model_len: Longest prompt with its response, in tokens; None is what the model allows.
        gpu_memory_utilization: Share of a GPU's memory that the engine takes, weights included, in (0, 1]. Teacher and
            student have an engine each.
        kv_cache: GiB for keys and values, above 0; None is 1 on the CPU, and on a GPU what its share leaves.
        eager: Whether nothing is compiled or recorded before the start, which takes a minute; None is True on the CPU
            alone.
        speculative: Has tokens drafted before the model checks them; None writes one at a time.
        engine: Further arguments of vLLM's `LLM`.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If vLLM is not installed, a number is outside its range, or `engine` has what is not its to set.
        ModelError: If `source` is not a model.
    """

    def __init__(
        self,
        source: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        batch_size: int = 64,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.4,
        kv_cache: float | None = None,
        eager: bool | None = None,
        speculative: Drafts | None = None,
        engine: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self._check_settings(batch_size, max_model_len, gpu_memory_utilization, kv_cache, engine or {})
        vllm_engine.require_vllm("VLLMGenerator")
        for own in (source, None if speculative is None else speculative.draft):
            if own is not None:
                check(own)
        self.source, self.dtype, self.batch_size, self.max_model_len = source, dtype, batch_size, max_model_len
        self.gpu_memory_utilization, self.kv_cache, self.eager = gpu_memory_utilization, kv_cache, eager
        self.speculative, self.engine, self.progress = speculative, dict(engine or {}), progress
        if source is not None:
            self.models = ()
        self._llm: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()
        self._held, self._updates = "", 0
        self._counted = (0.0, 0.0)

    @staticmethod
    def _check_settings(
        batch_size: int, max_model_len: int | None, share: float, kv_cache: float | None, engine: dict[str, Any]
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_model_len", max_model_len)):
            if value is not None and value < 1:
                raise ConfigError(f"VLLMGenerator.{name} must be at least 1, got {value}.")
        if not 0 < share <= 1:
            raise ConfigError(f"VLLMGenerator.gpu_memory_utilization must lie in (0, 1], got {share}.")
        if kv_cache is not None and not kv_cache > 0:
            raise ConfigError(f"VLLMGenerator.kv_cache must be above 0 GiB, got {kv_cache}.")
        taken = sorted(set(engine) & {*_OWN, *_SETTINGS})
        if taken:
            instead = _SETTINGS.get(taken[0])
            raise ConfigError(
                f"VLLMGenerator.engine may not set {taken[0]}: "
                + (f"use VLLMGenerator.{instead}." if instead else "its value follows from what a response must be.")
            )

    @cached_property
    def _identity(self) -> str | None:
        return None if self.source is None else _identity(self.source)

    def identity(self) -> str | None:
        """Names the weights of `source`, by the content of its files; None with the run's model."""
        return self._identity

    def check(self, sampling: Sampling) -> None:
        """Refuses to draft on the CPU at a temperature above 0, and temperatures that vLLM does not know.

        Raises:
            ConfigError: In these cases.
        """
        if sampling.temperature > 2:
            raise ConfigError(f"vLLM draws at temperatures up to 2, got Sampling.temperature = {sampling.temperature}.")
        if self.speculative is not None and sampling.temperature > 0 and vllm_engine.on_cpu():
            raise ConfigError(
                f"VLLMGenerator.speculative writes wrong tokens on the CPU at a temperature above 0, got "
                f"{sampling.temperature} (vLLM pull request 42638): use temperature 0, or leave speculative out."
            )

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Starts the engine, or hands it the weights that `model` has now if they are others.

        Raises:
            ConfigError: If the run has several ranks.
            ModelError: If vLLM can't run the model, or `source` has another tokenizer than the run.
        """
        self._tokenizer = tokenizer
        if self.source is not None:
            self._start_own()
            return
        base = base_model(model)
        self._eos = eos_ids(tokenizer, base)
        weights = fingerprint(model)
        if weights == self._held:
            return
        merged, start = merge_lora(model), time.perf_counter()
        vocab = min(len(tokenizer), logits_width(merged))
        if self._llm is None:
            with tempfile.TemporaryDirectory(prefix="distillkit-vllm-") as folder:
                vllm_engine.save(merged, vocab, Path(folder))
                own = str(base.dtype).removeprefix("torch.")
                self._llm = vllm_engine.start(folder, self._options(own), "VLLMGenerator")
        else:
            vllm_engine.update(self._llm, merged, vocab)
            self._updates += 1
        self._held = weights
        _log.info("vLLM has the weights %s (update %d, %.1f s).", weights, self._updates, time.perf_counter() - start)

    def _start_own(self) -> None:
        if self._llm is not None or self.source is None:
            return
        require_same(self._tokenizer, load_tokenizer(self.source), "of the run", self.source)
        self._eos = eos_ids(self._tokenizer, self.source)
        folder = prepare(self.source)
        self._llm = vllm_engine.start(folder, self._options(_dtype(folder)), "VLLMGenerator")
        _log.info("vLLM has the weights of %s (%s).", self.source, self.identity())

    def _options(self, dtype: str) -> dict[str, Any]:
        """What the engine is started with."""
        cpu = vllm_engine.on_cpu()
        kv_cache = 1.0 if self.kv_cache is None and cpu else self.kv_cache
        options: dict[str, Any] = {
            "dtype": self.dtype or dtype, "max_num_seqs": self.batch_size, "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": cpu if self.eager is None else self.eager,
            "kv_cache_memory_bytes": None if kv_cache is None else int(kv_cache * 2**30),
            # Nothing of the model's own generation_config, and log-probabilities before temperature and top-p.
            "generation_config": "vllm", "logprobs_mode": "raw_logprobs",
            "skip_tokenizer_init": True, "use_tqdm_on_load": False,
        }  # fmt: skip
        if self.speculative is not None:
            options |= {"speculative_config": self.speculative.as_config(), "disable_log_stats": False}
        return options | self.engine

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order.

        Raises:
            ConfigError: If a prompt and a response may be longer than `max_model_len`, or `check` fails.
        """
        self.check(sampling)
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0) + sampling.max_new_tokens
        room = int(self._llm.llm_engine.model_config.max_model_len)
        if longest > room:
            raise ConfigError(
                f"A prompt and its response may have {longest} tokens, and VLLMGenerator.max_model_len is {room}: "
                "raise it as far as the model allows, or lower max_new_tokens or data.max_length."
            )
        asked = [{"prompt_token_ids": list(prompt.input_ids)} for prompt in prompts]
        params = [self._params(sampling, sampling.seed_of(prompts.round, prompt.id)) for prompt in prompts]
        with token_bar("generate", len(prompts), self.progress) as advance:
            with vllm_engine.undisturbed():
                outputs = self._llm.generate(asked, params, use_tqdm=False) if asked else []
            found = [
                self._response(prompt.id, output.outputs[0]) for prompt, output in zip(prompts, outputs, strict=True)
            ]
            advance(len(found), sum(len(response.token_ids) for response in found))
        self._say_acceptance()
        return found

    def _params(self, sampling: Sampling, seed: int) -> Any:
        """Every setting that changes what is drawn, written out."""
        from vllm import SamplingParams  # with the engine, seconds ago
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=0.0, seed=seed,
            max_tokens=sampling.max_new_tokens, min_tokens=0, presence_penalty=0.0, frequency_penalty=0.0,
            repetition_penalty=1.0, stop=None, bad_words=None, logit_bias=None,
            # The engine's own end tokens are those of the model's files: ours are these, all of them and no others.
            stop_token_ids=list(self._eos), ignore_eos=True,
            logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def _response(self, prompt_id: str, output: Any) -> Response:
        tokens = tuple(output.token_ids)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        log_probs = tuple(place[token].logprob for place, token in zip(output.logprobs, tokens, strict=True))
        return Response(prompt_id, tokens, text, "stop" if tokens[-1] in self._eos else "length", log_probs)

    def _say_acceptance(self) -> None:
        if self.speculative is None:
            return
        names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if metric.name in names}
        before, self._counted = self._counted, (values.get(names[0], 0.0), values.get(names[1], 0.0))
        drafted, accepted = (now - then for now, then in zip(self._counted, before, strict=True))
        share = accepted / drafted if drafted else 0.0
        _log.info("%.0f of %.0f drafted tokens were accepted (%.3f).", accepted, drafted, share)


_SETTINGS = {
    "dtype": "dtype", "max_num_seqs": "batch_size", "max_model_len": "max_model_len",
    "gpu_memory_utilization": "gpu_memory_utilization", "kv_cache_memory_bytes": "kv_cache",
    "enforce_eager": "eager",
}  # fmt: skip
"""Arguments of the engine that have a setting of their own."""


def _dtype(folder: str) -> str:
    """The type in which a model was saved; vLLM by itself would turn float32 into half precision."""
    from transformers import AutoConfig  # here, for a fast start of the command line

    with quiet(), explained(folder, "config"):
        found = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def _identity(source: str) -> str:
    """A hub id with its commit, or a hash of the files that make the model."""
    folder = Path(prepare(source))
    if not folder.is_dir():
        return f"vllm {identity(source)}"
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json")):
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"vllm {digest.hexdigest()[:16]}"
