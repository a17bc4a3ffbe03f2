"""All parts and cases in their order, with the sizes of a real measurement and those of a trial."""

from dataclasses import replace
from typing import Any

from gpu_parts.cases import Case, Part

FULL_SIZES: dict[str, tuple[int, int, int]] = {
    "8k×128k": (8192, 128_256, 4096),
    "1k×152k": (1024, 151_936, 4096),
    "8k×152k": (8192, 151_936, 4096),
}
"""N positions, V vocabulary and D width of the loss head."""
TINY_SIZES = {"8k×128k": (64, 512, 32), "1k×152k": (32, 640, 32), "8k×152k": (64, 640, 32)}
HEAD_ANCHORS = {
    "8k×128k jsd": {"distillkit": "jsd liger", "liger": "jsd liger", "formula": "jsd formula"},
    "8k×152k kl": {"distillkit": "ce trl", "trl": "ce trl", "liger": "ce liger", "formula": "ce formula"},
}

FULL_PAIRS = {
    "1B": {"shape": "random-1b", "rows": 32, "micro_batches": 4, "prompt": 512, "response": 512},
    "7B→1.5B": {"shape": "random-7b-1.5b", "rows": 16, "micro_batches": 2, "prompt": 512, "response": 512},
}
TINY_PAIRS = {
    name: {"shape": "random-tiny", "rows": 8, "micro_batches": pair["micro_batches"], "prompt": 16, "response": 16}
    for name, pair in FULL_PAIRS.items()
}


def make_parts(device: str, tiny: bool, real: str | None) -> list[Part]:
    """The parts in their order.

    Args:
        device: `cuda` or `cpu`.
        tiny: Whether sizes are those of a trial.
        real: Source of a real model; without one the last two parts are left out, but for a trial.
    """
    return [
        Part("tests", "Tests that need a GPU", 30, tuple(test_cases(tiny))),
        Part("loss", "The loss with both heads", 17, tuple(head_cases(TINY_SIZES if tiny else FULL_SIZES))),
        Part("step", "A whole optimizer step", 25, tuple(step_cases(TINY_PAIRS if tiny else FULL_PAIRS, device))),
        Part("generation", "Generation", 6, tuple(generation_cases(tiny, real))),
        Part("real", "The quickstart's pair", 11, tuple(real_cases(tiny, real))),
        Part("compare", "A comparison of methods", 11, tuple(compare_cases(tiny, real))),
    ]


def test_cases(tiny: bool) -> list[Case]:
    """The tests of the GPU's folder, and then the marked ones of all others."""
    function = "gpu_parts.gpu_tests:run"
    # A trial is to be short; on a CPU all of them run by DISTILLKIT_GPU_TESTS_ON=cpu pytest tests/gpu.
    select = "test_pinned or test_streams or test_finite or test_throughput or test_slices" if tiny else None
    cases = [Case("tests/gpu", function, {"target": "tests/gpu", "select": select}, limit=240)]
    if not tiny:
        arguments = {"target": "tests", "ignore": "tests/gpu"}
        cases.append(Case("other tests", function, arguments, limit=240, least=15))
    return cases


def head_cases(sizes: dict[str, tuple[int, int, int]]) -> list[Case]:
    """Two divergences at the first size and the last, KL alone where positions are few; what compiles comes last."""
    quick, liger, compiled = [], [], []
    for name, size in sizes.items():
        product = Case(f"{name} matrix products", "gpu_parts.loss_head:products", {"size": size})
        quick.append(replace(product, anchor="ce product" if name == "8k×152k" else None))
        for divergence in ("kl",) if name == "1k×152k" else ("jsd", "kl"):
            label, base = f"{name} {divergence}", {"size": size, "divergence": divergence}
            anchors = HEAD_ANCHORS.get(label, {})
            quick.append(head_case(f"{label} distillkit", base, "distillkit", anchors.get("distillkit")))
            quick.append(head_case(f"{label} formula", base, "textbook", anchors.get("formula")))
            if divergence == "kl":
                tiles = head_case(f"{label} TRL tiles", base, "trl-chunked", anchors.get("trl"))
                quick.append(replace(tiles, needs=("trl",)))
            chunks = base | {"chunk_sizes": [1024, 4096]}
            liger.append(
                Case(
                    f"{label} Liger",
                    "gpu_parts.loss_head:fastest_liger",
                    chunks,
                    ("liger_kernel",),
                    anchor=anchors.get("liger"),
                )
            )
            compiled.append(
                head_case(f"{label} distillkit compiled", base, "distillkit", anchors.get("distillkit"), compiled=True)
            )
    return [*quick, *liger, *compiled]


def head_case(name: str, base: dict[str, Any], implementation: str, anchor: str | None, **options: Any) -> Case:
    """One implementation of a divergence."""
    arguments = base | {"implementation": implementation} | options
    return Case(name, "gpu_parts.loss_head:head", arguments, anchor=anchor)


def step_cases(pairs: dict[str, dict[str, Any]], device: str) -> list[Case]:
    """Distillkit's settings and TRL's trainers on the 1B pair, then distillkit on the larger one."""
    small, large = pairs

    def case(name: str, pair: str, function: str = "distillkit", needs: tuple[str, ...] = (), **options: Any) -> Case:
        anchor = "step trl" if pair == small and (function == "trl" or name == "live, shared") else None
        arguments = {"work": pairs[pair]} | options
        return Case(f"{pair} {name}", f"gpu_parts.step_part:{function}", arguments, needs, 120, 8, anchor)

    trl = ("trl", "datasets")
    liger = [case("TRL GKDTrainer, Liger", small, "trl", (*trl, "liger_kernel"), trainer="GKDTrainer", liger=True)]
    # Liger puts its kernels into transformers' module, where every later Llama of the process would use them.
    liger = [replace(entry, alone=True) for entry in liger]
    return [
        case("live, shared", small),
        *(liger if device == "cuda" else []),  # its layers are kernels of a GPU
        case("TRL DistillationTrainer", small, "trl", trl, trainer="DistillationTrainer"),
        case("TRL GKDTrainer", small, "trl", trl, trainer="GKDTrainer"),
        case("profile", small, "profile"),
        case("cached teacher", small, cached=True),
        case("live, shared", large),
        case("cached teacher", large, cached=True),
        case("live, packed", small, layout="packed"),
        case("live, padded", small, layout="padded"),
        case("live, shared, bf16-true", small, precision="bf16-true"),
        case("live, shared, DistiLLM2", small, loss="DistiLLM2"),
    ]


def generation_cases(tiny: bool, real: str | None) -> list[Case]:
    """Three ways to write the same number of tokens."""
    sizes = {"shape": "random-7b-1.5b", "prompts": 64, "prompt_tokens": 64, "new_tokens": 128}
    if tiny:
        sizes = {"shape": "random-tiny", "prompts": 4, "prompt_tokens": 8, "new_tokens": 8}
    sides = {"plain": "generate", "transformers": "TransformersGenerator", "vllm": "VLLMGenerator"}
    model = "real model" if real else "tiny" if tiny else "1.5B"
    return [
        Case(
            f"{model} {text}",
            "gpu_parts.generation_part:generate",
            {"side": side} | sizes,
            ("vllm",) if side == "vllm" else (),
            90,
        )
        for side, text in sides.items()
    ]


def real_cases(tiny: bool, real: str | None) -> list[Case]:
    """The quickstart; a trial has a model of its own."""
    return [
        Case(
            "quickstart",
            "gpu_parts.real_pair:train",
            {"ready": tiny or real is not None},
            limit=300,
            least=2 if tiny else 45,
            anchor="quickstart cpu",
        )
    ]


def compare_cases(tiny: bool, real: str | None) -> list[Case]:
    """The quick comparison; a trial has a model of its own."""
    return [
        Case(
            "methods",
            "gpu_parts.compare_part:compare",
            {"ready": tiny or real is not None},
            limit=900,
            least=2 if tiny else 70,
            anchor="compare cpu",
        )
    ]
