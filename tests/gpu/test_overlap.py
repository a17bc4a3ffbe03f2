"""Rounds that are written on a stream and in a thread of their own while the device trains."""

import threading
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pytest
import torch

from distillkit import Sampling
from distillkit.curators.single import StudentCurator
from distillkit.devices.streams import writer_stream
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import ReverseKL
from distillkit.models.copies import frozen_copy
from distillkit.models.fingerprint import fingerprint
from distillkit.models.student import Student
from distillkit.storage.responses import ResponseStore
from distillkit.types import Prompts, Response
from gpu.small import ON_CPU, data_of, fit, module_of, needs_cuda
from helpers.models import tiny_model, tiny_tokenizer
from helpers.runs import MemoryLogger

pytestmark = pytest.mark.gpu

PROMPTS, STEPS = 10, 5
"""Five steps an epoch; rounds of two steps begin at steps 0, 2 and 4 of each."""
STARTS = (0, 2, 4, 5, 7, 9)
SHORT = Sampling(max_new_tokens=5)


class Weights(lightning.Callback):
    """Keeps the student's fingerprint before each step."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.names.append(fingerprint(pl_module.student))


class OnStreams(TransformersGenerator):
    """Keeps the threads and streams that responses are written on."""

    seen: set[tuple[str, int]] = set()  # noqa: RUF012 the run's generators are copies

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        stream = 0 if ON_CPU else torch.cuda.current_stream().cuda_stream
        self.seen.add((threading.current_thread().name, stream))
        return super().generate(prompts, sampling)


def run(
    folder: Path, models: tuple[str, str], ahead: bool = True, lr: float = 0.1, every: int = 2, **trainer: Any
) -> tuple[Weights, MemoryLogger]:
    """Two epochs on the student's own responses."""
    weights = Weights()
    module = module_of(
        models,
        student=Student(models[1]),
        loss=ReverseKL(),
        curator=StudentCurator(SHORT, {"every": every}),
        generator=OnStreams(progress=False),
        overlap=ahead,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
    )
    log = fit(folder, module, data_of(folder / "data", prompts=PROMPTS), [weights], max_epochs=2, **trainer)
    assert not any(thread.name.startswith("round") for thread in threading.enumerate())
    return weights, log


def written(folder: Path) -> dict[int, tuple[str, dict[str, tuple[int, ...]]]]:
    """Of each round: the weights that wrote it, and the tokens of each prompt's response."""
    store, rounds = ResponseStore(folder / "responses"), dict[int, tuple[str, dict[str, tuple[int, ...]]]]()
    for shard in store.shards():
        with pa.memory_map(str(folder / "responses" / shard["file"])) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        weights = shard["model"].partition("+")[0]
        model, tokens = rounds.setdefault(shard["round"], (weights, {}))
        assert weights == model
        tokens |= {row["prompt_id"]: tuple(row["token_ids"]) for row in rows}
    return rounds


def test_each_round_has_the_weights_of_the_start_of_the_one_before(models: tuple[str, str], tmp_path: Path) -> None:
    OnStreams.seen.clear()
    weights, log = run(tmp_path, models)
    assert len(set(weights.names)) == 2 * STEPS
    rounds = written(tmp_path)
    expected = [weights.names[STARTS[max(0, number - 1)]] for number in range(6)]
    assert [rounds[number][0] for number in range(6)] == expected
    assert log.column("curation/lag") == [0, 0, 2, 2, 2, 1, 1, 2, 2, 2]
    vocab = len(tiny_tokenizer())
    for number, (_, responses) in rounds.items():
        assert len(responses) == (4, 4, 2)[number % 3]
        assert all(0 < len(tokens) <= 5 and max(tokens) < vocab for tokens in responses.values())
    assert {name for name, _ in OnStreams.seen} == {f"round {number}" for number in range(6)}
    assert ON_CPU or all(stream != torch.cuda.default_stream().cuda_stream for _, stream in OnStreams.seen)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_that_stay_write_the_same_ahead_as_in_turn(
    precision: str, models: tuple[str, str], tmp_path: Path
) -> None:
    for name, ahead in (("ahead", True), ("in turn", False)):
        run(tmp_path / name, models, ahead, lr=0.0, every=1, precision=precision)
    ahead, in_turn = written(tmp_path / "ahead"), written(tmp_path / "in turn")
    assert len(ahead) == 2 * STEPS
    assert ahead == in_turn
    assert len({tokens for _, responses in ahead.values() for tokens in responses.values()}) > PROMPTS, "they are drawn"


def test_the_writers_stream_waits_for_what_the_device_was_given_before(device: torch.device) -> None:
    # The copy of the student is queued by the thread that trains, behind a step that is still at work.
    model = tiny_model().to(device)
    expected = fingerprint(tiny_model(seed=3))
    snapshot = frozen_copy(model, device)
    for _ in range(3):
        if not ON_CPU:
            torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), tiny_model(seed=3).parameters(), strict=True):
                parameter.copy_(new)
            frozen_copy(model, device, snapshot)
            names: list[str] = []

            def write(stream: Any, names: list[str] = names) -> None:
                with stream:
                    names.append(fingerprint(snapshot))

            thread = threading.Thread(target=write, args=(writer_stream(device),))
            thread.start()
            thread.join()
            assert names == [expected]
            for parameter in model.parameters():
                parameter.zero_()
        assert fingerprint(snapshot) == expected, "it stays while the student moves"
        frozen_copy(model, device, snapshot)


@needs_cuda
def test_training_goes_on_while_the_writer_is_busy(device: torch.device) -> None:
    release, ended = threading.Event(), torch.cuda.Event()

    def write(stream: Any) -> None:
        with stream:
            torch.cuda._sleep(1_000_000_000)  # about half a second
            ended.record()
            release.set()

    thread = threading.Thread(target=write, args=(writer_stream(device),))
    thread.start()
    assert release.wait(30)
    value = torch.ones(1000, device=device).sum().item()  # waits for the stream that trains, and for no other
    assert value == 1000
    assert not ended.query(), "the device did one after the other"
    thread.join()
    torch.cuda.synchronize()
