"""Whole runs whose student writes through vLLM's own engine. Minutes, in an environment with vLLM.

They come before the tests of the engine alone, one of which drafts from n-grams: no engine can be started in the same
process after that, because vLLM 0.32 then looks into numba's modules and stumbles over what it finds there.
"""

import logging
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pytest
import torch
import yaml
from lightning import Callback

from distillkit import DistillData, DistillModule, Sampling
from distillkit.curators.single import StudentCurator
from distillkit.data.records import Source
from distillkit.generators.transformers import TransformersGenerator
from distillkit.generators.vllm.generator import VLLMGenerator
from distillkit.losses import ReverseKL
from distillkit.models.copies import frozen_copy
from distillkit.models.fingerprint import fingerprint
from distillkit.models.student import Student
from distillkit.storage.responses import ResponseStore
from distillkit.teachers.transformers import TransformersTeacher
from helpers.docs import ROOT
from helpers.runs import QUIET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]

QUICKSTART = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
SOURCE = QUICKSTART["model"]["student"]["source"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=10)
PROMPTS, EPOCHS = 6, 3


class StudentCopies(Callback):
    """Copies of the student as it is when an epoch starts."""

    def __init__(self) -> None:
        self.students: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.students.append(frozen_copy(pl_module.student, torch.device("cpu")))


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "a round ahead"])
def test_each_round_is_what_the_student_of_its_time_writes(
    overlap: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = StudentCopies()
    module = DistillModule(
        Student(SOURCE, dtype="float32", keep_layers=[0, 1, 28, 29]),
        ReverseKL(),
        TransformersTeacher(SOURCE, "float32"),
        StudentCurator(GREEDY),
        overlap=overlap,
        generator=VLLMGenerator(max_model_len=192, kv_cache=0.25, progress=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_schedule="constant",
        warmup=0.0,
        answers=GREEDY,
    )
    folder = ROOT / "configs" / "prompts"
    data = DistillData(
        Source(str(folder / "quickstart-train.jsonl"), limit=PROMPTS),
        batch_size=2,
        val=Source(str(folder / "quickstart-heldout.jsonl"), limit=2),
    )
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        callbacks=[kept],
        gradient_clip_val=1.0,
        **QUIET,
    )
    with caplog.at_level(logging.INFO, "distillkit.generators.vllm.generator"):
        trainer.fit(module, data)

    store = ResponseStore(tmp_path / "responses")
    prompts, tokenizer = data.prompts["train"], module.tokenizer
    found: dict[int, dict[str, list[int]]] = {}
    for shard in store.shards():
        if shard["writer"] == "student":
            with pa.memory_map(str(tmp_path / "responses" / shard["file"])) as source:
                rows = pa.ipc.open_file(source).read_all().to_pylist()
            found.setdefault(shard["round"], {}).update({row["prompt_id"]: row["token_ids"] for row in rows})
            writer = kept.students[max(0, shard["round"] - overlap)]
            assert shard["model"].partition("+")[0] == fingerprint(writer), (
                "the weights of the round's start, or of the one before"
            )
    assert sorted(found) == list(range(EPOCHS))
    agreed = total = 0
    for number, responses in found.items():
        plain = TransformersGenerator(progress=False)
        plain.refresh(kept.students[max(0, number - overlap)], tokenizer)
        for response in plain.generate(prompts, GREEDY):
            ours, theirs = responses[response.prompt_id], list(response.token_ids)
            pairs = zip(ours, theirs, strict=False)
            agreed += next((place for place, (a, b) in enumerate(pairs) if a != b), len(theirs))
            total += len(theirs)
    print(f"greedy agreement {agreed}/{total}")
    assert agreed >= 0.95 * total
    assert found[0] != found[EPOCHS - 1], "or training moved nothing"
    updates = [record.getMessage() for record in caplog.records if "vLLM has the weights" in record.getMessage()]
    assert sum("(update 0" in text for text in updates) == 2, "an engine of the student's and one of the teacher's"
    assert len(updates) > EPOCHS, "and new weights without a restart"
