"""Workload of a training step: pairs of models of known shapes, and rows of random token ids."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from distillkit.models import Student

LENGTHS: dict[str, tuple[int, int]] = {"even": (128, 128), "prompt": (384, 64), "response": (64, 384)}
"""Mean tokens of a prompt and of a response."""

ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
"""The optimizer of all variants; the learning rate is constant and no gradient is clipped."""

_SPREAD = 0.5  # standard deviation of the lengths' logarithm
_SHORTEST = 16
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Setup:
    """All that a child process needs to know; plain values, so that they travel as JSON.

    Args:
        folder: Holds `teacher` and `student`, and what a run writes.
        shape: A key of `SHAPES`.
        lengths: A key of `LENGTHS`.
        rows: Rows of a step, two for each prompt.
        steps: Optimizer steps, warm-up included.
        device: `cpu` or `cuda`.
        precision: `32-true`; `bf16-mixed`: the student's weights in float32 under autocast, the teacher's in bf16; or
            `bf16-true`: both in bf16.
        threads: Threads of torch on the CPU.
        seed: Of the rows and of weights that are drawn.
        micro_batches: How many a step is split into; `rows` is a multiple of twice that.
        exact: Tokens of every prompt and of every response, in the place of `lengths`.
    """

    folder: str
    shape: str
    lengths: str
    rows: int
    steps: int
    device: str
    precision: str
    threads: int
    seed: int = 0
    micro_batches: int = 1
    exact: tuple[int, int] | None = None

    @property
    def mixed(self) -> bool:
        """True if the step runs under autocast."""
        return self.precision == "bf16-mixed"

    @property
    def teacher_dtype(self) -> str:
        """Type of the teacher's weights."""
        return "float32" if self.precision == "32-true" else "bfloat16"

    @property
    def student_dtype(self) -> str:
        """Type of the student's weights."""
        return "bfloat16" if self.precision == "bf16-true" else "float32"

    def path(self, name: str) -> str:
        """A path in the folder."""
        return str(Path(self.folder) / name)


class Example(NamedTuple):
    """One row: the token ids of prompt and response, who wrote it, and which prompt it belongs to."""

    prompt: list[int]
    response: list[int]
    writer: str
    prompt_id: str


def examples(setup: Setup) -> list[Example]:
    """The rows of all steps in order; the two of a prompt stand together. Fewer steps have the first of more.

    Lengths are log-normal around their mean, at least 16 and at most four times the mean tokens. Ids are uniform over
    the vocabulary above the special tokens, which all stand at its beginning in the tokenizers used here.
    """
    tokenizer = load_tokenizer(setup)
    vocab = AutoConfig.from_pretrained(setup.path("student")).vocab_size
    first = max(tokenizer.added_tokens_decoder) + 1
    assert first < vocab // 2, "special tokens are not at the beginning of the vocabulary"
    generator = torch.Generator().manual_seed(setup.seed)
    shorter, spread = (SHAPES[setup.shape].shorter, _SPREAD) if setup.exact is None else (1, 0.0)
    prompt_mean, response_mean = (mean // shorter for mean in setup.exact or LENGTHS[setup.lengths])

    def drawn(mean: int) -> list[int]:
        exponent = math.log(mean) - spread**2 / 2 + spread * float(torch.randn((), generator=generator))
        length = min(max(round(math.exp(exponent)), min(_SHORTEST, mean)), 4 * mean)
        return torch.randint(first, vocab, (length,), generator=generator).tolist()

    rows = []
    for index in range(setup.steps * setup.rows // 2):
        prompt = drawn(prompt_mean)
        rows += [Example(prompt, drawn(response_mean), writer, f"{index:08x}") for writer in ("teacher", "student")]
    return rows


def step_examples(setup: Setup) -> list[list[Example]]:
    """The rows of each step."""
    rows = examples(setup)
    return [rows[start : start + setup.rows] for start in range(0, len(rows), setup.rows)]


@dataclass(frozen=True)
class Shape:
    """A pair of models.

    Args:
        save: Writes `teacher` and `student` into a folder; a config without weights has them drawn in each process.
        shorter: Divides the mean lengths.
    """

    save: Callable[[Path], None]
    shorter: int = 1


def load_tokenizer(setup: Setup) -> Any:
    """The tokenizer of both models."""
    return PreTrainedTokenizerFast.from_pretrained(setup.path("student"))


def has_weights(folder: str) -> bool:
    """True if the folder contains the weights."""
    return any(Path(folder).glob("*.safetensors"))


def load_model(setup: Setup, name: str) -> Any:
    """The `teacher` or the `student` in its type, on the device."""
    dtype = getattr(torch, setup.teacher_dtype if name == "teacher" else setup.student_dtype)
    folder = setup.path(name)
    if has_weights(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(setup.device)
        for parameter in model.parameters():  # mapped files would be counted as memory when they are first read
            parameter.data = parameter.data.clone()
        return model
    torch.manual_seed(setup.seed + (name == "teacher"))
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def quickstart_pair() -> tuple[str, list[int]]:
    """The quickstart's teacher, and the twelve of its layers that the student of the benchmarks has."""
    source: str = yaml.safe_load(QUICKSTART.read_text())["model"]["student"]["source"]
    return source, [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 29]


def _save_smollm2(folder: Path) -> None:
    """The real pair: SmolLM2-135M, and a copy of 12 of its 30 layers."""
    source, layers = quickstart_pair()
    for name, loader in (("teacher", Student(source)), ("student", Student(source, keep_layers=layers))):
        loader.load().save_pretrained(folder / name)
        loader.tokenizer().save_pretrained(folder / name)


def _save_tiny(folder: Path) -> None:
    for name, layers in (("teacher", 3), ("student", 2)):
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
            **_ENDS,
        )
        torch.manual_seed(layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        _word_tokenizer().save_pretrained(folder / name)


def _save_random_7b(folder: Path) -> None:
    """Qwen2's shapes of 7B and 1.5B with one vocabulary; no weights."""
    sizes: dict[str, dict[str, Any]] = {
        "teacher": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "student": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    }
    for name, size in sizes.items():
        config = Qwen2Config(vocab_size=151936, num_hidden_layers=28, **_ENDS, **size)
        config.architectures = ["Qwen2ForCausalLM"]
        _save_config(config, folder / name)


def _save_random_1b(folder: Path) -> None:
    """Llama 3.2's shape of 1B for both models; no weights."""
    _save_random_llamas(
        folder,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def _save_random_tiny(folder: Path) -> None:
    """A pair that is drawn as the large ones are, for tests of that."""
    _save_random_llamas(
        folder,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def _save_random_llamas(folder: Path, **size: int) -> None:
    for name in ("teacher", "student"):
        config = LlamaConfig(tie_word_embeddings=True, **_ENDS, **size)
        config.architectures = ["LlamaForCausalLM"]
        _save_config(config, folder / name)


def _save_config(config: Any, folder: Path) -> None:
    config.save_pretrained(folder)
    _word_tokenizer().save_pretrained(folder)


# Without a pad id in the config transformers does not treat that row of the embedding in a way of its own.
_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of three special tokens: the rows are token ids already."""
    words = {"<unk>": 0, "<pad>": 1, "<end>": 2}
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), **special)


SHAPES = {
    "smollm2": Shape(_save_smollm2),
    "tiny": Shape(_save_tiny, shorter=8),
    "random-7b-1.5b": Shape(_save_random_7b),
    "random-1b": Shape(_save_random_1b),
    "random-tiny": Shape(_save_random_tiny, shorter=8),
}
