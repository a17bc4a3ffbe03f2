"""Training steps of `DistillModule` under Lightning's Trainer against those of trl's GKDTrainer.

Both have the same weights, the same rows of token ids, the same masks, optimizer and learning rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import DistillData, DistillModule, Student
from distillkit.data.chat import encode
from distillkit.data.collate import collate
from distillkit.losses import ForwardKL, GeneralizedJSD, ReverseKL
from distillkit.models.scoring import score
from distillkit.models.tokenizers import eos_ids
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Batch, Record, Row
from helpers.models import tiny_model
from helpers.runs import QUIET, MemoryLogger, UnequalPairs, save_models, write_prompts

pytestmark = [
    pytest.mark.conformance,
    # What trl, transformers and accelerate warn of is theirs.
    pytest.mark.filterwarnings("ignore"),
]

LOSSES = {
    0.0: ForwardKL,
    0.5: lambda *given: GeneralizedJSD(0.5, *given),
    1.0: ReverseKL,
}
# AdamW divides a gradient by its own size: with a smaller eps the rounding of the smallest gradients becomes a step.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0}
SGD = {"lr": 0.1}
OPTIMIZERS = {"sgd": (torch.optim.SGD, SGD), "adamw": (torch.optim.AdamW, ADAMW)}
TOLERANCE = 1e-6


@dataclass
class Run:
    """What training gave.

    Args:
        losses: Of each optimizer step.
        weights: The student's, afterwards.
        batches: The batches that we trained on; none of trl's.
        written: What trl drew from a model: token ids, attention masks and labels of each batch.
    """

    losses: list[float]
    weights: Mapping[str, torch.Tensor]
    batches: Sequence[Batch] = ()
    written: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = ()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student as folders."""
    return save_models(tmp_path_factory.mktemp("models"))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_here(folder, models, loss, optimizer="sgd", accumulate=1, clip=None, decay=0.0):
    """Two steps of four rows, two to a prompt."""
    teacher, student = models
    make, settings = OPTIMIZERS[optimizer]
    logger = MemoryLogger()
    module = DistillModule(
        Student(student),
        loss,
        TransformersTeacher(teacher, "float32"),
        UnequalPairs(),
        lr_schedule="constant",
        optimizer=lambda parameters: make(parameters, **(settings | {"weight_decay": decay})),
        warmup=0.0,
    )
    data = DistillData(write_prompts(folder / "prompts.jsonl", 4), batch_size=2 // accumulate, shuffle=False)
    trainer = lightning.Trainer(
        max_epochs=1,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        logger=logger,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, data)
    return Run(logger.column("train/loss"), module.student.state_dict(), list(data.train_dataloader()))


def rows_of(batches):
    """The rows as trl's collator takes them: token ids with a mask of the completion."""
    rows = []
    for batch in batches:
        for ids, real, trained in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
            rows.append(
                {"prompt": "", "input_ids": ids[real].tolist(), "completion_mask": trained[real].int().tolist()}
            )
    return rows


def train_there(gkd, folder, models, rows, optimizer="sgd", accumulate=1, clip=0.0, decay=0.0, **settings):
    """Steps of four rows by GKDTrainer, in their order; by default on the rows as they are (`lmbda` 0)."""
    teacher, student = map(loaded, models)
    losses, written = [], []

    class RecordingTrainer(gkd.GKDTrainer):
        def training_step(self, *args, **kwargs):
            losses.append(float(super().training_step(*args, **kwargs)))
            return torch.tensor(losses[-1])

        def generate_on_policy_outputs(self, *args, **kwargs):
            written.append(super().generate_on_policy_outputs(*args, **kwargs))
            return written[-1]

    arguments = {
        "output_dir": str(folder / "trl"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "optim": {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer],
        "learning_rate": OPTIMIZERS[optimizer][1]["lr"],
        "adam_beta1": ADAMW["betas"][0],
        "adam_beta2": ADAMW["betas"][1],
        "adam_epsilon": ADAMW["eps"],
        "weight_decay": decay,
        "lr_scheduler_type": "constant",
        "max_grad_norm": clip,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lmbda": 0.0,
    }
    trainer = RecordingTrainer(
        model=student,
        teacher_model=teacher,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models[1]),
        args=gkd.GKDConfig(**(arguments | settings)),
    )
    trainer.train()
    steps = [sum(losses[start : start + accumulate]) for start in range(0, len(losses), accumulate)]
    return Run(steps, student.state_dict(), written=written)


def largest(first, second):
    """The largest difference between two sets of weights, by name."""
    assert first.keys() == second.keys()
    return {name: float((first[name] - second[name]).abs().max()) for name in first}


@pytest.mark.parametrize(
    ("beta", "optimizer", "accumulate", "clip"),
    [(0.0, "sgd", 1, 0.0), (0.5, "sgd", 1, 0.0), (1.0, "sgd", 1, 0.0), (0.5, "adamw", 2, 0.0), (0.0, "adamw", 1, 0.5)],
)
def test_steps_have_the_same_losses_and_give_the_same_weights(gkd, models, tmp_path, beta, optimizer, accumulate, clip):
    ours = train_here(tmp_path, models, LOSSES[beta]("token_mean"), optimizer, accumulate, clip or None)
    theirs = train_there(gkd, tmp_path, models, rows_of(ours.batches), optimizer, accumulate, clip, beta=beta)
    assert len(ours.losses) == len(theirs.losses) == 2
    assert ours.losses == pytest.approx(theirs.losses, abs=TOLERANCE)
    assert max(largest(ours.weights, loaded(models[1]).state_dict()).values()) > 1000 * TOLERANCE
    assert max(largest(ours.weights, theirs.weights).values()) < TOLERANCE


def test_their_weight_decay_leaves_out_norms_and_ours_does_not(gkd, models, tmp_path):
    decay, steps = 0.1, 2
    ours = train_here(tmp_path, models, ForwardKL("token_mean"), "adamw", decay=decay)
    theirs = train_there(gkd, tmp_path, models, rows_of(ours.batches), "adamw", decay=decay, beta=0.0)
    found = largest(ours.weights, theirs.weights)
    expected = steps * ADAMW["lr"] * decay  # a norm's weights are about 1
    norms = {name for name in found if "norm" in name}
    assert {name: found[name] for name in norms} == pytest.approx(dict.fromkeys(norms, expected), rel=0.05)
    others = {name: found[name] for name in found.keys() - norms}
    assert max(others.values()) < 0.1 * expected, "they differ by what the norms did to the second step alone"


def test_their_mean_is_over_tokens_and_ours_over_responses_unless_told(gkd, models, tmp_path):
    ours = train_here(tmp_path, models, ForwardKL())
    rows = rows_of(ours.batches)
    theirs = train_there(gkd, tmp_path, models, rows, beta=0.0)
    assert len(set(ours.batches[0].lengths)) > 1
    assert (ours.losses[0], theirs.losses[0]) == pytest.approx((1.325, 1.314), abs=0.001)
    alone = train_there(gkd, tmp_path, models, rows, beta=0.0, per_device_train_batch_size=1, learning_rate=0.0)
    assert ours.losses[0] == pytest.approx(sum(alone.losses[:4]) / 4, abs=TOLERANCE)


def test_their_temperature_is_not_in_the_loss(gkd, models, tmp_path):
    ours = train_here(tmp_path, models, GeneralizedJSD(0.5, "token_mean", temperature=2.0))
    rows = rows_of(ours.batches)
    plain, hot = (train_there(gkd, tmp_path, models, rows, beta=0.5, temperature=t).losses for t in (1.0, 2.0))
    assert hot == plain
    assert (plain[0], ours.losses[0]) == pytest.approx((0.2456, 0.0733), abs=0.0001)


def test_on_policy_their_loss_is_divided_by_the_tokens_of_answers_that_are_not_trained_on(gkd, models, tmp_path):
    prompts = [list(range(10, 15 + row)) for row in range(4)]
    found = {}
    for length in (4, 32):
        answers = [[20] * length] * 4
        rows = [
            {"prompt": "", "input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * length}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found[length] = train_there(gkd, tmp_path, models, rows, beta=0.0, lmbda=1.0, temperature=0.9, max_new_tokens=8)
    drawn, others = (run.written[0] for run in found.values())
    assert torch.equal(drawn[0], others[0]), "the same responses were drawn"
    ours = mean_here(models, *drawn)
    num_drawn = int((drawn[2] != -100).sum())
    assert num_drawn == 32
    for length, run in found.items():
        assert run.losses[0] == pytest.approx(ours * num_drawn / (4 * length), rel=1e-5)
    assert (ours, found[4].losses[0], found[32].losses[0]) == pytest.approx((1.240, 2.480, 0.310), abs=0.001)


@torch.no_grad()
def mean_here(models, ids, attention, labels):
    """Forward KL, a mean over the tokens that are trained on."""
    rows = [
        Row(tuple(own[real].tolist()), tuple((target[real] != -100).tolist()), "student", str(number))
        for number, (own, real, target) in enumerate(zip(ids, attention.bool(), labels, strict=True))
    ]
    batch = collate(rows, pad_id=0)
    teacher, student = (score(model, batch, model.config.vocab_size) for model in map(loaded, models))
    output = ForwardKL("token_mean")(student, teacher, batch)
    return float(output.total / output.units)


def test_they_refuse_a_wider_teacher(gkd, models, tmp_path):
    teacher, student = tiny_model(vocab=330), loaded(models[1])
    with pytest.raises(ValueError, match="which requires a shared vocabulary"):
        gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            processing_class=AutoTokenizer.from_pretrained(models[1]),
            args=gkd.GKDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": "", "input_ids": [1, 2], "completion_mask": [0, 1]}]),
        )


def test_their_collator_trains_on_what_the_template_puts_behind_a_response(gkd, models):
    from trl.experimental.utils import DataCollatorForChatML

    tokenizer = AutoTokenizer.from_pretrained(models[1])
    messages = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is so."}]
    labels = DataCollatorForChatML(tokenizer, max_length=None)([{"messages": messages}])["labels"][0]
    theirs = tokenizer.decode(labels[labels != -100])
    prompt = encode(Record(tuple(messages), "here"), tokenizer, eos_ids(tokenizer, None), chat=True)
    ours = tokenizer.decode([i for i, own in zip(prompt.reference_ids, prompt.reference_mask, strict=True) if own])
    assert (ours, theirs) == ("It is so.<|im_end|>", "It is so.<|im_end|>\n")
