"""The contract finds each kind of broken teacher, and says which promise it breaks."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from distillkit.data.collate import collate
from distillkit.testing import BigramTeacher, TeacherContract, check_teacher
from distillkit.types import Scores


class Sound(BigramTeacher):
    """A sound teacher that a broken one differs from in one method."""


class SkipsTheLast(Sound):
    def score(self, batch):
        scores = super().score(batch)
        return replace(scores, hidden=scores.hidden[:-1])


class Learns(Sound):
    def setup(self, device):
        super().setup(device)
        self._table.requires_grad_()


class GivesNaN(Sound):
    def score(self, batch):
        scores = super().score(batch)
        return replace(scores, hidden=scores.hidden * torch.nan)


class Centres(Sound):
    """Its scores depend on the batch."""

    def score(self, batch):
        scores = super().score(batch)
        return replace(scores, hidden=scores.hidden - scores.hidden.mean(0))


class ReadsPadding(Sound):
    def score(self, batch):
        scores = super().score(batch)
        return replace(scores, hidden=scores.hidden * (1.0 + batch.input_ids.float().mean()))


class IsNotCut(Sound):
    def limit_vocab(self, size):
        """Nothing."""


class CutsTheFirst(Sound):
    def score(self, batch):
        last = batch.input_ids.flatten()[batch.positions]
        return Scores.from_logits(self._table[last, -self._vocab :])


class DrawsAnew(Sound):
    def setup(self, device):
        self.seed += 1
        super().setup(device)


class ForgetsWhatItUnloads(Sound):
    def setup(self, device):
        if self._table is None:
            super().setup(device)

    def unload(self):
        super().unload()
        self.seed += 1


class HasNoTokenizer(Sound):
    def tokenizer(self):
        return None


class IsNamedByAnObject(Sound):
    def identity(self):
        return self.seed


class IsNamedAnew(Sound):
    numbers = itertools.count()

    def identity(self):
        return str(next(self.numbers))


BROKEN = {
    SkipsTheLast: r"score must return \[10, 320\] log-probabilities, got \[9, 320\]",
    Learns: "score must return log-probabilities without a gradient",
    GivesNaN: "probabilities must sum to 1",
    Centres: "a row must have the same scores alone",
    ReadsPadding: "a row must have the same scores alone",
    IsNotCut: "vocab_size must be 317 after limit_vocab, got 320",
    CutsTheFirst: "after limit_vocab scores must be those of the first tokens",
    DrawsAnew: "a second setup must change nothing",
    ForgetsWhatItUnloads: "the scores must be the same after unload and setup",
    HasNoTokenizer: r"tokenizer\(\) must return a tokenizer before setup",
    IsNamedByAnObject: r"identity\(\) must return a string or None, got 0",
    IsNamedAnew: r"identity\(\) must be equal for two identically constructed teachers",
}


def test_a_sound_teacher_passes():
    check_teacher(Sound)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_teacher_is_found(broken):
    with pytest.raises(AssertionError, match=rf"^{broken.__name__} breaks its contract: .*({BROKEN[broken]})"):
        check_teacher(broken)


def test_a_contract_without_a_teacher_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=re.escape("write make()")):
        TeacherContract().test_each_position_has_a_distribution()


def test_a_bigram_teacher_reads_the_last_token_alone():
    teacher = BigramTeacher(seed=3, vocab=12)
    teacher.setup(torch.device("cpu"))
    batch = collate(TeacherContract().rows(), pad_id=0)
    found = teacher.score(batch).log_probs()
    last = batch.input_ids.flatten()[batch.positions].tolist()
    assert len(set(last)) < len(last)
    for first, second in itertools.combinations(range(len(last)), 2):
        assert torch.equal(found[first], found[second]) == (last[first] == last[second])
