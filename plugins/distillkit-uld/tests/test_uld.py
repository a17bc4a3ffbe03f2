import copy

import numpy as np
import pytest
import torch
from distillkit_uld.loss import ULD
from distillkit_uld.spans import aligned, boundaries, common
from distillkit_uld.teacher import AlignedScores, CrossTokenizerTeacher
from scipy.stats import wasserstein_distance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillkit import registry
from distillkit.cli import main
from distillkit.data import collate, encode
from distillkit.errors import ConfigError, DataError
from distillkit.models import eos_ids
from distillkit.testing import check_loss, make_batch, tiny_model, tiny_tokenizer
from distillkit.training import DistillModule
from distillkit.types import Prompts, Record, Row, Scores
from helpers.runs import QUIET, save_models, write_config, write_prompts

TEXTS = ["The capital of France is Paris.", " two  spaces, then é, 漢字 and 👍🏽!", "tab\tline\n\nend", "", "a"]


def other_tokenizer():
    """A tokenizer with another vocabulary, other token ids and another chat template."""
    chatml = tiny_tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", chatml.eos_token],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["What is the capital of France? It is so very large. The sea is wide."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=chatml.eos_token, pad_token="<pad>")
    tokenizer.chat_template = chatml.chat_template.replace("<|im_start|>", "## ")
    return tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, other_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_boundaries_are_those_of_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, read = boundaries(tokenizer, ids)
    assert decoded == text
    assert len(read) == len(ids) + 1
    assert read[0] == 0
    assert read[-1] == len(text)
    ascending = [num_chars for num_chars in read if num_chars is not None]
    assert ascending == sorted(ascending)
    for boundary, num_chars in enumerate(read):
        prefix = tokenizer.decode(ids[:boundary])
        if num_chars is None:
            assert not text.startswith(prefix)
        else:
            assert text[:num_chars] == prefix


def test_within_a_character_there_is_no_boundary():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a👍b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6, "the thumb has four tokens"
    assert boundaries(tokenizer, ids)[1] == [0, 1, None, None, None, 2, 3]


def test_boundaries_are_aligned_after_the_same_text():
    # abc|de|f and ab|c|def: after abc and at both ends.
    assert aligned([0, 3, 5, 6], [0, 2, 3, 6], same=6) == [0, 2, None, 3]
    assert aligned([0, 3, None, 6], [0, None, 3, 6], same=4) == [0, 2, None, None], "the texts differ from there on"
    assert common("Paris", "Parts") == 3
    assert common("a", "ab") == 1


@pytest.mark.parametrize("text", TEXTS)
def test_aligned_positions_have_read_the_same_text(text):
    student, teacher = tiny_tokenizer(), other_tokenizer()
    ids, teacher_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher))
    matches = aligned(boundaries(student, ids)[1], boundaries(teacher, teacher_ids)[1], len(text))
    assert matches[0] == 0
    assert matches[-1] == len(teacher_ids)
    for boundary, match in enumerate(matches):
        if match is not None:
            assert student.decode(ids[:boundary]) == teacher.decode(teacher_ids[:match])


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_it_keeps_the_contract_of_a_loss(reduction):
    check_loss(ULD(reduction=reduction))


def test_the_distance_is_that_of_wasserstein():
    # For a cost of 1 between all ranks, as scipy has it for masses at the places of the ranks' probabilities.
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = make_batch((4, 2), ("dataset", "dataset"), (0, 1), 9)
    distances = ULD()(Scores.from_logits(student), Scores.from_logits(teacher), batch).metrics["distance"].numpy()
    p, q = (np.sort(logits.softmax(-1).numpy(), -1) for logits in (teacher, student))
    for row in range(6):
        assert distances[row] == pytest.approx(9 * wasserstein_distance(p[row], q[row]))


def test_a_worked_case_with_vocabularies_of_different_sizes():
    # q = (½, ¼, ¼) and p = (¼, ¾): |¾ − ½| + |¼ − ¼| + |0 − ¼| = ½, and −log q of the token 0 is log 2.
    student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    batch = collate([Row((1, 0), (False, True), "dataset", "p")], pad_id=0)
    output = ULD(weight=3.0)(Scores.from_logits(student), Scores.from_logits(teacher), batch)
    assert output.total.tolist() == pytest.approx([np.log(2), 1.5])


def test_positions_that_are_not_aligned_have_no_distance():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    batch = make_batch((3,), ("dataset",), (0,), 5)
    scores = Scores.from_logits(teacher)
    mask = torch.tensor([True, False, True])
    output = ULD(cross_entropy=0.0)(
        Scores.from_logits(student), AlignedScores(scores.hidden, scores.head, 7, aligned=mask), batch
    )
    (grad,) = torch.autograd.grad(output.total.sum(), student)
    assert grad.abs().sum(-1).ne(0).tolist() == [True, False, True]
    assert output.metrics["aligned"].tolist() == [1, 0, 1]
    assert len(output.metrics["distance"]) == 2


def prompt_of(question, answer, tokenizer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return encode(Record(messages, "here"), tokenizer, eos_ids(tokenizer, None), chat=True)


@pytest.fixture
def teacher(tmp_path):
    tokenizer = other_tokenizer()
    tiny_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return CrossTokenizerTeacher(str(tmp_path / "other"), "float32")


ANSWERS = ["It is Paris.", "", "So very large, é!"]


def rows_of(teacher, ended=True):
    """Rows of the student's tokens, which the teacher has prepared."""
    tokenizer = tiny_tokenizer()
    prompts = Prompts(tuple(prompt_of(f"Question {i}?", text, tokenizer) for i, text in enumerate(ANSWERS)))
    rows = [
        Row(prompt.reference_ids[:stop], prompt.reference_mask[:stop], "dataset", prompt.id)
        for prompt in prompts
        for stop in [len(prompt.reference_ids) - (0 if ended else 1)]
    ]
    rows = [row for row in rows if any(row.response_mask)]
    teacher.prepare_alignment(tokenizer, prompts)
    teacher.setup(torch.device("cpu"))
    teacher.prepare(rows)
    return tokenizer, prompts, rows


@pytest.mark.parametrize("ended", [True, False])
def test_its_scores_are_what_it_says_after_the_same_text(teacher, ended):
    tokenizer, prompts, rows = rows_of(teacher, ended)
    batch = collate(rows, tokenizer.pad_token_id)
    scores = teacher.score(batch)
    assert scores.vocab == len(other_tokenizer())
    log_probs, teacher_tokenizer = scores.log_probs(), other_tokenizer()

    def encode_text(text):
        return teacher_tokenizer(text, add_special_tokens=False)["input_ids"]

    position = compared = 0
    for row in rows:
        messages = next(prompt.messages for prompt in prompts if prompt.id == row.prompt_id)
        rendered = teacher_tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
        response = [token for token, used in zip(row.input_ids, row.response_mask, strict=True) if used]
        for index in range(len(response)):
            if scores.aligned[position]:
                text = tokenizer.decode(response[:index])
                prefix_length = len(encode_text(text))
                answer = encode_text(tokenizer.decode(response, skip_special_tokens=True))
                ids = encode_text(rendered) + answer[:prefix_length]
                if teacher_tokenizer.decode(ids).endswith(text):
                    with torch.no_grad():
                        expected = teacher.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                    torch.testing.assert_close(log_probs[position], expected, rtol=1e-4, atol=1e-4)
                    compared += 1
            position += 1
    assert position == batch.num_tokens
    assert compared >= len(rows), "at least the beginning of each"


def test_rows_of_the_previous_round_are_available_and_older_ones_are_not(teacher):
    tokenizer, _, rows = rows_of(teacher)
    teacher.prepare(rows[:1])
    positions = sum(sum(row.response_mask) for row in rows)
    assert len(teacher.score(collate(rows, tokenizer.pad_token_id)).hidden) == positions
    teacher.prepare(rows[:1])
    with pytest.raises(KeyError):
        teacher.score(collate(rows, tokenizer.pad_token_id))


def test_a_row_that_it_can_not_read_is_refused(teacher):
    _, _, rows = rows_of(teacher)
    several = Row(rows[0].input_ids, (True, *rows[0].response_mask[1:]), "dataset", rows[0].prompt_id)
    with pytest.raises(DataError, match="has several trained turns, or a prompt that is not in the data"):
        teacher.prepare([several])


def config(root, out, **model):
    part = {"class_path": "CrossTokenizerTeacher", "init_args": {"source": str(root / "other"), "dtype": "float32"}}
    return write_config(
        root / f"{out}.yaml",
        {
            "trainer": QUIET | {"default_root_dir": str(root / out), "max_epochs": 1},
            "model": {
                "student": {"source": str(root / "student")},
                "teacher": part,
                "loss": "ULD",
                "curator": "DatasetCurator",
                "answers": {"temperature": 0.0, "max_new_tokens": 4},
                "generator": {"class_path": "TransformersGenerator", "init_args": {"progress": False}},
            }
            | model,
            "data": {"train": str(root / "train.jsonl"), "val": str(root / "val.jsonl"), "batch_size": 2},
        },
    )


@pytest.fixture
def root(tmp_path, teacher):
    save_models(tmp_path)
    write_prompts(tmp_path / "train.jsonl", 4, response=True)
    write_prompts(tmp_path / "val.jsonl", 2, response=True)
    return tmp_path


def test_a_run_learns_from_a_teacher_with_another_tokenizer(root, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)
    assert main(["fit", "--config", config(root, "run")]) == 0
    lines = (root / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    share = [float(row["train/aligned"]) for row in rows if row["train/aligned"]]
    assert all(0.2 < value <= 1 for value in share)
    assert [row["val/nll"] != "" for row in rows].count(True) == 2
    assert "val/kl" not in rows[0], "nothing is compared token by token"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"loss": "ForwardKL"}, "uses another tokenizer than the student, and ForwardKL compares token by token"),
        ({"curator": "TeacherCurator"}, "uses another tokenizer than the student, so TeacherCurator can't train"),
    ],
)
def test_what_such_a_teacher_can_not_do_is_said_before_a_model_is_loaded(model, message, root, capsys, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.setattr(DistillModule, "configure_model", lambda self: pytest.fail("model loaded"))
    assert main(["fit", "--config", config(root, "wrong", **model)]) == 1
    assert message in capsys.readouterr().err


def test_it_checks_no_drafts_of_the_student(root, capsys, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.setattr(DistillModule, "configure_model", lambda self: pytest.fail("model loaded"))
    assert main(["evaluate", "--config", config(root, "drafts"), "--draft", "2"]) == 1
    assert "--draft needs a teacher with the student's vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weight", "cross_entropy"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ConfigError, match=rf"ULD\.{name} must be at least 0, got -1\.0"):
        ULD(**{name: -1.0})


def test_they_are_registered_by_name():
    assert registry.get("loss", "ULD") is ULD
    assert registry.get("teacher", "CrossTokenizerTeacher") is CrossTokenizerTeacher
    assert copy.deepcopy(ULD()).weight == 1.5
    assert not ULD.compares_tokens
