"""What a training step works on: pairs of models of known shapes, and rows of drawn token ids."""

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

from distillkit.models.student import Student

LENGTHS: dict[str, tuple[int, int]] = {"even": (128, 128), "prompt": (384, 64), "response": (64, 384)}
"""Mean tokens of a prompt and of a response."""

ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
"""The optimizer of all variants; the learning rate is constant and no gradient is clipped."""

_SPREAD = 0.5  # standard deviation of the lengths' logarithm
_SHORTEST = 16
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


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
        precision: `32-true`, or `bf16-mixed`: the student's weights in float32 under autocast, the teacher's in bf16.
        threads: Threads of torch on the CPU.
        seed: Of the rows and of weights that are drawn.
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

    @property
    def mixed(self) -> bool:
        """Whether the step runs under autocast."""
        return self.precision == "bf16-mixed"

    @property
    def teacher_dtype(self) -> str:
        """Type of the teacher's weights."""
        return "bfloat16" if self.mixed else "float32"

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
    prompt_mean, response_mean = (mean // SHAPES[setup.shape].shorter for mean in LENGTHS[setup.lengths])

    def drawn(mean: int) -> list[int]:
        exponent = math.log(mean) - _SPREAD**2 / 2 + _SPREAD * float(torch.randn((), generator=generator))
        length = min(max(round(math.exp(exponent)), min(_SHORTEST, mean)), 4 * mean)
        return torch.randint(first, vocab, (length,), generator=generator).tolist()

    rows = []
    for place in range(setup.steps * setup.rows // 2):
        prompt = drawn(prompt_mean)
        rows += [Example(prompt, drawn(response_mean), writer, f"{place:08x}") for writer in ("teacher", "student")]
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
    """Whether the weights are in the folder."""
    return any(Path(folder).glob("*.safetensors"))


def load_model(setup: Setup, name: str) -> Any:
    """The `teacher` or the `student` in its type, on the device."""
    dtype = getattr(torch, setup.teacher_dtype if name == "teacher" else "float32")
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
    """The quickstart's teacher, and which of its layers the student has."""
    student = yaml.safe_load(QUICKSTART.read_text())["model"]["student"]
    return student["source"], student["keep_layers"]


def _save_smollm2(folder: Path) -> None:
    """The quickstart's pair: SmolLM2-135M, and a copy of 12 of its 30 layers."""
    source, layers = quickstart_pair()
    for name, loader in (("teacher", Student(source)), ("student", Student(source, keep_layers=layers))):
        loader.load().save_pretrained(folder / name)
        loader.tokenizer().save_pretrained(folder / name)


def _save_tiny(folder: Path) -> None:
    for name, layers in (("teacher", 3), ("student", 2)):
        config = LlamaConfig(
            vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, **_ENDS,
        )  # fmt: skip
        torch.manual_seed(layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        _word_tokenizer().save_pretrained(folder / name)


def _save_random_7b(folder: Path) -> None:
    """Qwen2's shapes of 7B and 1.5B with one vocabulary; no weights."""
    sizes: dict[str, dict[str, Any]] = {
        "teacher": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
                    "num_key_value_heads": 4},
        "student": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
                    "tie_word_embeddings": True},
    }  # fmt: skip
    for name, size in sizes.items():
        config = Qwen2Config(vocab_size=151936, num_hidden_layers=28, **_ENDS, **size)
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder / name)
        _word_tokenizer().save_pretrained(folder / name)


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
}
