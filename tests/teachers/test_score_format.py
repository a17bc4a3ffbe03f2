import pytest
import torch

from distillkit.data.collate import collate
from distillkit.teachers.score_format import TopKFormat
from distillkit.types import Scores
from helpers.scores import WIDTH, Counting, Unloadable, in_order, live, only_folder, ready, some_rows


def top_k_and_live(source, k, vocab=WIDTH):
    rows = in_order(some_rows(30, vocab=vocab))
    batch = collate(rows, 1)
    ready(Counting(source), rows, vocab, keep="top_k", k=k)
    found = ready(Unloadable(source), rows, vocab, keep="top_k", k=k, folder=only_folder()).score(batch)
    return found, live(source, batch, vocab=vocab).log_probs(), batch


@pytest.mark.parametrize("vocab", [WIDTH, WIDTH - 50])
def test_the_most_likely_tokens_and_all_others_sum_to_one(vocab, source):
    found, exact, batch = top_k_and_live(source, 5, vocab)
    assert found.top_k_ids.shape == (batch.num_tokens, 5)
    assert found.vocab == 6
    assert int(found.top_k_ids.max()) < vocab
    logp = found.log_probs()
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(len(logp)), rtol=1e-6, atol=0)
    assert torch.equal(found.top_k_ids, exact.topk(5, dim=-1).indices)
    # Half precision has 11 bits: a log-probability is off by 2^-11 of itself, and renormalising moves all by as much.
    torch.testing.assert_close(logp[:, :5], exact.gather(-1, found.top_k_ids), rtol=2**-10, atol=1e-3)
    tail = 1 - exact.exp().gather(-1, found.top_k_ids).sum(-1)
    torch.testing.assert_close(logp[:, 5].exp(), tail, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.target_logp, exact.gather(-1, batch.targets[:, None]).squeeze(-1))


def student_log_probs(num_positions):
    return torch.randn(num_positions, WIDTH, generator=torch.Generator().manual_seed(3)).double().log_softmax(-1)


def coarse(logq, top_k_ids):
    """The student's probabilities of the tokens in `top_k_ids`, then of all others together."""
    top = logq.gather(-1, top_k_ids)
    return torch.cat([top, logq.scatter(-1, top_k_ids, -torch.inf).logsumexp(-1, keepdim=True)], dim=-1)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(-1)


def test_with_all_but_one_token_kept_a_divergence_is_the_exact_one_to_rounding(source):
    found, exact, batch = top_k_and_live(source, WIDTH - 1)
    logq = student_log_probs(batch.num_tokens)
    expected = kl(exact.double(), logq)
    difference = (kl(found.log_probs().double(), coarse(logq, found.top_k_ids)) - expected).abs()
    # Rounding each log p by 2^-11 of itself moves KL by Σ p |log p| (1 + |log p/q|) 2^-11. Measured: 4e-4 at most, a
    # thirtieth of twice that bound.
    bound = (exact.exp() * exact.abs() * (1 + (exact - logq).abs())).sum(-1) * 2**-11 * 2
    assert (difference <= bound).all()
    assert float(expected.min()) > 0.1


@pytest.mark.parametrize("k", [1, 16, 200])
def test_what_a_coarse_kl_lacks_is_the_divergence_within_the_tail(k, source):
    found, exact, batch = top_k_and_live(source, k)
    exact, logq = exact.double(), student_log_probs(batch.num_tokens)
    p = coarse(exact, found.top_k_ids)
    lacking = kl(exact, logq) - kl(p, coarse(logq, found.top_k_ids))
    # The chain rule of relative entropy: what is lost is p(tail) KL(p given tail ‖ q given tail).
    in_tail = torch.ones_like(exact, dtype=torch.bool).scatter(-1, found.top_k_ids, False)
    within = [
        exact[i, kept].log_softmax(-1).exp() @ (exact[i, kept].log_softmax(-1) - logq[i, kept].log_softmax(-1))
        for i, kept in enumerate(in_tail)
    ]
    torch.testing.assert_close(lacking, p[:, -1].exp() * torch.stack(within))
    assert (lacking >= 0).all()
    # At most p(tail) times the largest log-ratio of the two conditional distributions.
    ratio = exact - p[:, -1:] - (logq - coarse(logq, found.top_k_ids)[:, -1:])
    assert (lacking <= p[:, -1].exp() * ratio.masked_fill(~in_tail, -torch.inf).amax(-1) + 1e-12).all()
    stored = kl(found.log_probs().double(), coarse(logq, found.top_k_ids))
    torch.testing.assert_close(stored, kl(p, coarse(logq, found.top_k_ids)), rtol=5e-3, atol=5e-3)


def test_extreme_logits_stay_finite_in_half_precision():
    kept = TopKFormat(2, 4)
    logits = torch.tensor([[0.0, -1e5, -2e5, -3e5], [0.0, 0.0, 0.0, -1e5]])
    packed = kept.pack(Scores.from_logits(logits), torch.tensor([3, 0]))
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        name: column.dtype for name, column in kept.columns.items()
    }
    assert all(tensor.float().isfinite().all() for tensor in packed.values())
    logp = kept.unpack(packed, 4).log_probs()
    assert (logp.exp() * logp).isfinite().all()
    assert packed["own"].tolist() == pytest.approx([-3e5, -1.0986], rel=1e-4)


@pytest.mark.parametrize(("vocab", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_token_ids_fit_their_type(vocab, dtype):
    logits = torch.zeros(2, vocab)
    logits[:, -1] = 9
    kept = TopKFormat(3, vocab)
    packed = kept.pack(Scores.from_logits(logits), torch.tensor([0, vocab - 1]))
    assert packed["ids"].dtype == dtype
    assert kept.unpack(packed, vocab).top_k_ids[:, 0].tolist() == [vocab - 1, vocab - 1]


def test_positions_are_packed_a_slice_at_a_time(monkeypatch):
    scores = Scores.from_logits(torch.randn(7, 10, generator=torch.Generator().manual_seed(0)))
    kept, targets = TopKFormat(3, 10), torch.arange(7)
    whole = kept.pack(scores, targets)
    monkeypatch.setattr("distillkit.teachers.score_format.SLICE_LOGITS", 20)
    parts = kept.pack(scores, targets)
    assert all(torch.equal(whole[name].float(), parts[name].float()) for name in whole)
    assert all(len(tensor) == 0 for tensor in kept.pack(scores.select(targets[:0]), targets[:0]).values())


def test_each_way_to_keep_has_a_folder_of_its_own(source, tmp_path):
    folder = str(tmp_path / "scores")
    for settings in ({}, {"keep": "top_k", "k": 3}, {"keep": "top_k", "k": 4}):
        ready(Counting(source), some_rows(2), folder=folder, **settings)
    ready(Counting(source), some_rows(2), WIDTH - 1, folder=folder, keep="top_k", k=3)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "hidden",
        "teacher.json",
        f"top-3-of-{WIDTH - 1}",
        f"top-3-of-{WIDTH}",
        f"top-4-of-{WIDTH}",
    ]
