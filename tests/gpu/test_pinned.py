"""Batches on their way to the device: through pinned memory, without a wait, and whole."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from distillkit import DistillData
from distillkit.data.collate import collate
from distillkit.losses import DistiLLM2
from distillkit.types import Batch, Packed, Row
from gpu.small import ON_CPU, data_of, fit, module_of, needs_cuda, packed_batch

pytestmark = pytest.mark.gpu

DATA = DistillData("unread.jsonl")


def tensors_of(part: Batch | Packed) -> dict[str, Tensor]:
    """All tensors of a batch and of its packed rows, by name; not those of the window."""
    tensors = {field.name: getattr(part, field.name) for field in fields(part)}
    packed = tensors_of(part.packed) if isinstance(part, Batch) and part.packed is not None else {}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)} | {
        f"packed.{name}": tensor for name, tensor in packed.items()
    }


def moved(batch: Batch, device: torch.device) -> Batch:
    return DATA.transfer_batch_to_device(batch, device, 0)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_all_tensors_arrive_and_are_equal(layout: Any, device: torch.device) -> None:
    rows = [Row(tuple(range(2, 2 + length)), (False, *[True] * (length - 1)), "teacher", "a") for length in (3, 9, 5)]
    batch = collate(rows, pad_id=0, layout=layout)
    window = (batch, packed_batch(40))
    arrived = moved(replace(batch, window=window), device)
    names = tensors_of(batch)
    assert len(names) == (6 if layout == "padded" else 9)
    for name, value in tensors_of(arrived).items():
        assert value.device == device, name
        assert value.dtype == names[name].dtype
        assert torch.equal(value.cpu(), names[name]), name
    assert tensors_of(arrived).keys() == names.keys()
    assert (arrived.lengths, arrived.writer, arrived.pair, arrived.keys) == (
        batch.lengths,
        batch.writer,
        batch.pair,
        batch.keys,
    )
    assert layout == "padded" or arrived.packed.segments == batch.packed.segments
    assert arrived.window is not None
    assert all(micro_batch.input_ids.device.type == "cpu" for micro_batch in arrived.window), (
        "they are counted on the host"
    )


def test_a_batch_without_a_response_arrives_too(device: torch.device) -> None:
    batch = collate([Row((3, 4, 5), (False,) * 3, "teacher", "a")], pad_id=0)
    arrived = moved(batch, device)
    assert arrived.num_tokens == len(arrived.positions) == 0
    assert arrived.positions.device == device


@needs_cuda
def test_the_copies_read_pinned_memory_and_do_not_wait(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = Batch.to

    def watched(batch: Batch, to: Any, non_blocking: bool = False) -> Batch:
        pinned = [tensor.is_pinned() for tensor in tensors_of(batch).values()]
        copies.append((all(pinned), len(pinned), non_blocking))
        return original(batch, to, non_blocking)

    monkeypatch.setattr(Batch, "to", watched)
    moved(packed_batch(100), device)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    done.record()
    arrived = moved(packed_batch(100), device)
    assert not done.query(), "the host waited for the device"
    torch.cuda.synchronize()
    assert torch.equal(arrived.input_ids.cpu(), packed_batch(100).input_ids)
    assert copies == [(True, 9, True)] * 2


def test_the_host_copy_may_be_overwritten_afterwards(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("on the CPU a batch is not copied")
    for seed in range(20):
        batch = packed_batch(300, seed)
        expected = {name: tensor.clone() for name, tensor in tensors_of(batch).items()}
        torch.cuda._sleep(20_000_000)  # the copy is still to come
        arrived = moved(batch, device)
        for tensor in tensors_of(batch).values():
            tensor.zero_()
        # And what was pinned on the way may be given to the next batch.
        later = [
            tensor for other in range(5) for tensor in tensors_of(packed_batch(300, 100 + other).pin_memory()).values()
        ]
        assert all(tensor.is_pinned() for tensor in later)
        for name, tensor in tensors_of(arrived).items():
            assert torch.equal(tensor.cpu(), expected[name]), name


class Places(lightning.Callback):
    """Keeps where the tensors of each batch are."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        self.packed = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.devices |= {tensor.device for tensor in tensors_of(batch).values()}
        self.packed += batch.packed is not None

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, *_: Any) -> None:
        self.devices |= {tensor.device for tensor in tensors_of(batch).values()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_in_a_run_every_batch_is_on_the_device(
    precision: Any, models: tuple[str, str], device: torch.device, tmp_path: Path
) -> None:
    watcher = Places()
    module = module_of(models, loss=DistiLLM2())
    data = data_of(tmp_path / "data", held_out=2, layout="shared")
    fit(tmp_path, module, data, [watcher], accumulate_grad_batches=2, precision=precision)
    assert watcher.devices == {device}
    assert watcher.packed == 4
    assert ON_CPU or next(module.student.parameters()).is_cuda
