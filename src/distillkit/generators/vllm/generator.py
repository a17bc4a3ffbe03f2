"""Generator that runs vLLM's engine in this process."""

import hashlib
import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from distillkit.errors import ConfigError
from distillkit.generators.progress import token_bar
from distillkit.generators.texts import decoded
from distillkit.generators.vllm import engine as vllm_engine
from distillkit.interfaces import Generator
from distillkit.models.checkpoint import explained, quiet
from distillkit.models.fingerprint import fingerprint
from distillkit.models.heads import logits_width
from distillkit.models.merging import merge_lora
from distillkit.models.options import SourceOptions
from distillkit.models.sources import check, identity, prepare
from distillkit.models.structure import base_model
from distillkit.models.tokenizers import eos_ids, load_tokenizer, require_same, vocab_size
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.outputs import CompletionOutput

_log = logging.getLogger(__name__)

_RESERVED = (
    "model",
    "seed",
    "generation_config",
    "skip_tokenizer_init",
    "logprobs_mode",
    "speculative_config",
)
"""Engine arguments that users can't set: the requirements on a response fix them."""

_SETTINGS = {
    "dtype": "dtype",
    "max_num_seqs": "batch_size",
    "max_model_len": "max_model_len",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "kv_cache_memory_bytes": "kv_cache",
    "enforce_eager": "eager",
}
"""Engine arguments that follow from a setting of the generator, with its name."""


@dataclass(frozen=True)
class SpeculativeDecoding:
    """Speculative decoding: tokens are drafted cheaply and checked by the model, whose distribution does not change.

    Args:
        num_tokens: Tokens per draft, at least 1.
        draft: Folder of a small model with the same tokenizer, such as a student's export; None drafts n-grams that
            occurred earlier in the prompt or response.
        max_ngram: Longest n-gram that is looked up, at least 1; used only without `draft`.

    Raises:
        ConfigError: If a number is below 1.
    """

    num_tokens: int = 4
    draft: str | None = None
    max_ngram: int = 4

    def __post_init__(self) -> None:
        for name, value in (("num_tokens", self.num_tokens), ("max_ngram", self.max_ngram)):
            if value < 1:
                raise ConfigError(f"SpeculativeDecoding.{name} must be at least 1, got {value}.")

    def as_config(self) -> dict[str, object]:
        """The engine's `speculative_config`."""
        if self.draft is None:
            method: dict[str, object] = {"method": "ngram", "prompt_lookup_max": self.max_ngram, "prompt_lookup_min": 1}
        else:
            method = {"method": "draft_model", "model": prepare(self.draft)}
        return {"num_speculative_tokens": self.num_tokens, **method}


class VLLMGenerator(Generator):
    """Generates with vLLM. The engine starts with the first generation and runs until the process ends.

    New weights are loaded into the running engine. Each response is sampled with its own seed, and comes with the
    log-probability of each token under the model.

    Args:
        source: A separate model with the run's tokenizer, in one of the forms of docs/models.md; None uses the run's
            model. `revision` and `trust_remote_code` are set in `engine`.
        dtype: Type of the weights in the engine; None is the model's type.
        batch_size: Maximum number of responses generated at once, at least 1.
        max_model_len: Longest prompt with its response, in tokens; None is the model's limit.
        gpu_memory_utilization: Share of a GPU's memory that the engine takes, weights included, in (0, 1]. Teacher and
            student have one engine each.
        kv_cache: GiB for keys and values, above 0; None is 1 on the CPU, and on a GPU the rest of the engine's share.
        eager: Whether compilation and graph capture, which take a minute at the start, are skipped; None is True only
            on the CPU.
        speculative: Settings of speculative decoding; None generates one token at a time.
        engine: Further arguments of vLLM's `LLM`.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If vLLM is not installed, a number is outside its range, or `engine` sets a reserved argument.
        ModelError: If `source` is not a model.
    """

    _tokenizer: Tokenizer

    def __init__(
        self,
        source: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        batch_size: int = 64,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.4,
        kv_cache: float | None = None,
        eager: bool | None = None,
        speculative: SpeculativeDecoding | None = None,
        engine: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self._check_settings(batch_size, max_model_len, gpu_memory_utilization, kv_cache, engine or {})
        vllm_engine.require_vllm("VLLMGenerator")
        # vLLM has these two settings itself, so they are set among its arguments.
        self.options = SourceOptions((engine or {}).get("revision"), bool((engine or {}).get("trust_remote_code")))
        if source is not None:
            check(source, self.options)
        if speculative is not None and speculative.draft is not None:
            check(speculative.draft)
        self.source, self.dtype, self.batch_size, self.max_model_len = source, dtype, batch_size, max_model_len
        self.gpu_memory_utilization, self.kv_cache, self.eager = gpu_memory_utilization, kv_cache, eager
        self.speculative, self.engine, self.progress = speculative, dict(engine or {}), progress
        if source is not None:
            self.needs_models = ()
        self._llm: LLM | None = None
        self._eos: tuple[int, ...] = ()
        self._loaded_fingerprint, self._updates = "", 0
        self._draft_counts = (0.0, 0.0)  # drafted and accepted tokens since the engine started

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
        reserved = sorted(set(engine) & {*_RESERVED, *_SETTINGS})
        if reserved:
            setting = _SETTINGS.get(reserved[0])
            raise ConfigError(
                f"VLLMGenerator.engine can't set {reserved[0]}: "
                + (f"use VLLMGenerator.{setting}." if setting else "the requirements on a response fix its value.")
            )

    @cached_property
    def _identity(self) -> str | None:
        return None if self.source is None else _identity(self.source, self.options)

    def identity(self) -> str | None:
        """A hash of the files of `source`, or its commit on the hub; None with the run's model."""
        return self._identity

    def check(self, sampling: Sampling) -> None:
        """Checks that vLLM can sample as requested.

        Raises:
            ConfigError: If the temperature is above 2, or above 0 with speculative decoding on the CPU.
        """
        if sampling.temperature > 2:
            raise ConfigError(f"vLLM supports temperatures up to 2, got Sampling.temperature = {sampling.temperature}.")
        if self.speculative is not None and sampling.temperature > 0 and vllm_engine.on_cpu():
            raise ConfigError(
                f"VLLMGenerator.speculative generates wrong tokens on the CPU at a temperature above 0, got "
                f"{sampling.temperature} (vLLM pull request 42638). Use temperature 0, or remove speculative."
            )

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Starts the engine, or loads the current weights of `model` into it if they have changed.

        Raises:
            ConfigError: If the run has several ranks.
            ModelError: If vLLM can't run the model, or the tokenizer of `source` is not the run's.
        """
        self._tokenizer = tokenizer
        if self.source is not None:
            self._start_source()
            return
        base = base_model(model)
        self._eos = eos_ids(tokenizer, base)
        weights = fingerprint(model)
        if weights == self._loaded_fingerprint:
            return
        merged, start = merge_lora(model), time.perf_counter()
        vocab = min(vocab_size(tokenizer), logits_width(merged))
        if self._llm is None:
            with tempfile.TemporaryDirectory(prefix="distillkit-vllm-") as folder:
                vllm_engine.save(merged, vocab, Path(folder))
                dtype = str(base.dtype).removeprefix("torch.")
                self._llm = vllm_engine.start(folder, self._options(dtype), "VLLMGenerator")
        else:
            vllm_engine.update(self._llm, merged, vocab)
            self._updates += 1
        self._loaded_fingerprint = weights
        _log.info("vLLM has the weights %s (update %d, %.1f s).", weights, self._updates, time.perf_counter() - start)

    def _start_source(self) -> None:
        if self._llm is not None or self.source is None:
            return
        require_same(self._tokenizer, load_tokenizer(self.source, self.options), "the run", self.source)
        self._eos = eos_ids(self._tokenizer, self.source, self.options)
        folder = prepare(self.source, self.options)
        self._llm = vllm_engine.start(folder, self._options(_dtype(folder, self.options)), "VLLMGenerator")
        _log.info("vLLM has the weights of %s (%s).", self.source, self.identity())

    def _options(self, dtype: str) -> dict[str, object]:
        """The arguments of vLLM's `LLM`."""
        cpu = vllm_engine.on_cpu()
        kv_cache = 1.0 if self.kv_cache is None and cpu else self.kv_cache
        options: dict[str, object] = {
            "dtype": self.dtype or dtype,
            "max_num_seqs": self.batch_size,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": cpu if self.eager is None else self.eager,
            "kv_cache_memory_bytes": None if kv_cache is None else int(kv_cache * 2**30),
            "generation_config": "vllm",  # ignores the model's generation_config
            "logprobs_mode": "raw_logprobs",  # before temperature and top-p
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
        }
        if self.speculative is not None:
            options |= {"speculative_config": self.speculative.as_config(), "disable_log_stats": False}
        return options | self.engine

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in their order.

        Raises:
            ConfigError: If a prompt with its response may exceed `max_model_len`, or `check` fails.
        """
        self.check(sampling)
        assert self._llm is not None, "refresh comes first"
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0) + sampling.max_new_tokens
        limit = int(self._llm.llm_engine.model_config.max_model_len)
        if longest > limit:
            raise ConfigError(
                f"A prompt with its response may have {longest} tokens, but VLLMGenerator.max_model_len is {limit}. "
                "Raise it up to the model's limit, or lower max_new_tokens or data.max_length."
            )
        inputs = [{"prompt_token_ids": list(prompt.input_ids)} for prompt in prompts]
        params = [self._params(sampling, sampling.seed_of(prompts.round, prompt.id)) for prompt in prompts]
        with token_bar("generate", len(prompts), self.progress) as advance:
            with vllm_engine.undisturbed():
                outputs = self._llm.generate(inputs, params, use_tqdm=False) if inputs else []
            responses = [
                self._response(prompt, output.outputs[0]) for prompt, output in zip(prompts, outputs, strict=True)
            ]
            advance(len(responses), sum(len(response.token_ids) for response in responses))
        self._log_acceptance()
        return responses

    def _params(self, sampling: Sampling, seed: int) -> "SamplingParams":
        """Sampling parameters with every setting that affects the samples made explicit."""
        from vllm import SamplingParams  # optional, and imported by the engine already
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=0.0,
            seed=seed,
            max_tokens=sampling.max_new_tokens,
            min_tokens=0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            stop=None,
            bad_words=None,
            logit_bias=None,
            # The engine would take its end tokens from the model's files: these replace them.
            stop_token_ids=list(self._eos),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _response(self, prompt: Prompt, output: "CompletionOutput") -> Response:
        tokens = tuple(output.token_ids)
        text = decoded(self._tokenizer, tokens, self._eos, prompt)
        log_probs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True))
        return Response(prompt.id, tokens, text, "stop" if tokens[-1] in self._eos else "length", log_probs)

    def _log_acceptance(self) -> None:
        if self.speculative is None or self._llm is None:
            return
        names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if metric.name in names}
        previous, self._draft_counts = self._draft_counts, (values.get(names[0], 0.0), values.get(names[1], 0.0))
        drafted, accepted = (count - before for count, before in zip(self._draft_counts, previous, strict=True))
        share = accepted / drafted if drafted else 0.0
        _log.info("%.0f of %.0f drafted tokens were accepted (%.3f).", accepted, drafted, share)


def _dtype(folder: str, options: SourceOptions) -> str:
    """The type in which a model was saved; by default vLLM would convert float32 to half precision."""
    from transformers import AutoConfig  # here, for a fast start of the command line

    with quiet(), explained(folder, "config"):
        dtype = getattr(AutoConfig.from_pretrained(folder, **options.as_arguments()), "dtype", None)
    return str(dtype or "float32").removeprefix("torch.")


def _identity(source: str, options: SourceOptions) -> str:
    """A hub id with its commit, or a hash of the model's files."""
    folder = Path(prepare(source, options))
    if not folder.is_dir():
        return f"vllm {identity(source, options)}"
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json")):
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"vllm {digest.hexdigest()[:16]}"
