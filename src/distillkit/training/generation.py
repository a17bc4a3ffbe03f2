"""The generators of a run, behind its response store."""

from typing import Any, Protocol

from lightning import Trainer

from distillkit.devices.distributed import thread_barrier
from distillkit.interfaces import Curator, Generator, Teacher
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.stored import Ranks
from distillkit.storage.responses import ResponseStore
from distillkit.training.run_data import uses_chat_template
from distillkit.training.tokens import rendering
from distillkit.types import Tokenizer


class GeneratingModule(Protocol):
    """The training module as its generators see it."""

    student: Any
    generator: Generator
    curator: Curator
    overlap: bool | str
    shard_index: int
    num_shards: int

    @property
    def trainer(self) -> Trainer:
        """The trainer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""

    @property
    def store_folder(self) -> str:
        """Folder of the response store."""

    @property
    def same_vocab_teacher(self) -> Teacher | None:
        """The teacher, if it uses the student's tokenizer."""


def generator_pool(module: GeneratingModule) -> GeneratorPool:
    """The generators of a run, behind its response store."""
    trainer, teacher = module.trainer, module.same_vocab_teacher
    part = "" if module.num_shards == 1 else f"{module.shard_index + 1}of{module.num_shards}"
    # Rounds that are generated in another thread wait in a process group of their own.
    barrier = trainer.strategy.barrier if module.overlap is False else thread_barrier()
    return GeneratorPool(
        module.generator,
        ResponseStore(module.store_folder, trainer.global_rank, part),
        {"student": lambda: module.student, "teacher": lambda: None if teacher is None else teacher.model},
        module.tokenizer,
        Ranks(trainer.global_rank, trainer.world_size, barrier, module.shard_index, module.num_shards),
        None if teacher is None else teacher.fingerprint,
        module.curator.own_generators(),
        rendering(module.tokenizer, uses_chat_template(trainer)),
    )
