"""Heads of fully sharded models, on two ranks over gloo: gradients are the mean of the ranks', as of one process."""

from pathlib import Path

import pytest

from helpers.gloo import run_ranks

START = f"""
import sys
import types

sys.path.insert(0, {str(Path(__file__).parents[1])!r})

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from distillkit.chunked.output_head import OutputHead
from distillkit.losses import DistiLLM2
from distillkit.models.scoring import score
from distillkit.testing import make_batch
from distillkit.types import Scores
from helpers.models import tiny_model

torch.manual_seed(0)
V = 24
mesh = init_device_mesh("cpu", (world,))


def batch(rank):
    return make_batch((3 + rank, 2), ("teacher", "student"), (0, 0), V, seed=rank)


def loss(student, rank):
    shape = (batch(rank).num_tokens, V)
    teacher = Scores.from_logits(torch.randn(shape, generator=torch.Generator().manual_seed(rank)))
    return DistiLLM2()(student, teacher, batch(rank)).total.sum()


def largest_gap(sharded, whole):
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    grads = [(own.grad.full_tensor(), other.grad) for own, other in pairs]
    return max(float((own - other).abs().max() / other.abs().max()) for own, other in grads)
"""

HEAD = """
def hidden(rank):
    return torch.randn(batch(rank).num_tokens, 6, generator=torch.Generator().manual_seed(9 + rank)).requires_grad_()


whole = torch.nn.Linear(6, V)
sharded = torch.nn.Linear(6, V)
sharded.load_state_dict(whole.state_dict())
fully_shard(sharded, mesh=mesh)
own = hidden(rank)
loss(Scores(own, OutputHead(sharded, V), V), rank).backward()
(sum(loss(Scores(hidden(other), OutputHead(whole, V), V), other) for other in range(world)) / world).backward()
found = largest_gap(sharded, whole)
torch.distributed.barrier()  # a rank that leaves early closes what the other still reads
"""

MODEL = """
whole, sharded = (tiny_model(V, tie_word_embeddings=TIED) for _ in range(2))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
body = sharded.model
sharded.scored_body = types.MethodType(lambda self, **inputs: body(**inputs), sharded)
register_fsdp_forward_method(sharded, "scored_body")
sharded.get_decoder = lambda: sharded.scored_body
score_of = lambda model, other: score(model, batch(other), V)
loss(score_of(sharded, rank), rank).backward()
(sum(loss(score_of(whole, other), other) for other in range(world)) / world).backward()
found = largest_gap(sharded, whole)
torch.distributed.barrier()  # a rank that leaves early closes what the other still reads
"""


def test_a_head_that_is_sharded_on_its_own(tmp_path):
    assert max(run_ranks(START + HEAD, tmp_path)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_sharded_as_a_whole(tied, tmp_path):
    assert max(run_ranks(f"TIED = {tied}\n{START}{MODEL}", tmp_path)) < 1e-5
