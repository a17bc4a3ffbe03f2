import copy

import pytest
import torch
from torch import nn

from distillkit.models.fingerprint import fingerprint
from distillkit.models.loading import load_model
from helpers.models import tiny_model


def test_is_16_hex_digits_and_repeatable():
    first = fingerprint(tiny_model())
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert fingerprint(tiny_model()) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_survives_saving_and_loading(dtype, tmp_path):
    model = tiny_model().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert fingerprint(load_model(str(tmp_path), dtype)) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_bit_changes_it(dtype):
    model = tiny_model().to(dtype)
    before = fingerprint(model)
    weight = next(model.parameters()).data
    weight.view(-1).view(torch.uint8)[-1] ^= 1
    assert fingerprint(model) != before


def test_the_type_counts():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    # The same bytes in both.
    assert fingerprint(copy.deepcopy(model).to(torch.float16)) != fingerprint(copy.deepcopy(model).to(torch.bfloat16))


def test_names_and_shapes_count():
    flat, tall = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)
    for model in (flat, tall):
        nn.init.ones_(model.weight)
    assert fingerprint(flat) != fingerprint(tall)
    assert fingerprint(flat) != fingerprint(nn.Sequential(flat))


def test_saved_buffers_count_and_others_do_not():
    model = nn.BatchNorm1d(2)
    model.register_buffer("aside", torch.zeros(1), persistent=False)
    before = fingerprint(model)
    model.aside += 1
    assert fingerprint(model) == before
    model.num_batches_tracked += 1
    assert fingerprint(model) != before


def test_memory_layout_does_not_count():
    model = nn.Linear(3, 2, bias=False)
    before = fingerprint(model)
    model.weight.data = model.weight.data.t().contiguous().t()
    assert not model.weight.is_contiguous()
    assert fingerprint(model) == before


def test_tied_weights_are_read_once(monkeypatch):
    from distillkit.models import fingerprint as module

    model, read, original = tiny_model(tie_word_embeddings=True), [], module._bytes
    monkeypatch.setattr(module, "_bytes", lambda tensor: read.append(tensor) or original(tensor))
    fingerprint(model)
    assert len(read) == len(list(model.parameters()))


@pytest.mark.gpu
def test_the_device_does_not_count():
    assert fingerprint(tiny_model().to("cuda")) == fingerprint(tiny_model())
