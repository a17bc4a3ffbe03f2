"""Additional measurements of an evaluation: callbacks that run while the models are on the device."""

from lightning import Callback, LightningModule, Trainer
from torch import nn

from distillkit.errors import ConfigError
from distillkit.evaluation.lm_eval import Harness
from distillkit.evaluation.pass_at_k import sampled_passes
from distillkit.generators.speculative.generator import SpeculativeGenerator
from distillkit.training.module import DistillModule
from distillkit.types import Prompts, Sampling
from distillkit.workflows.launch import datamodule_of


class DraftAcceptance(Callback):
    """Measures how many tokens drafted by the student the teacher accepts (speculative decoding).

    Args:
        block: Number of tokens to draft at once.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.metrics: dict[str, float] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the teacher can verify drafts, before anything is measured.

        Raises:
            ConfigError: If the teacher's model is not in this process.
        """
        _teacher_model(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates the responses while both models are on the device."""
        assert isinstance(pl_module, DistillModule)
        generator = SpeculativeGenerator("exact", self.block, progress=False)
        models = nn.ModuleDict({"student": pl_module.student, "teacher": _teacher_model(pl_module)})
        generator.refresh(models, pl_module.tokenizer)
        sampling = Sampling(temperature=1.0, max_new_tokens=pl_module.answers.max_new_tokens)
        generator.generate(_held_out_prompts(trainer), sampling)
        counts = generator.metrics()
        self.metrics = {"drafted_acceptance": counts["acceptance"], "tokens_per_check": counts["tokens_per_check"]}

    on_test_start, on_test_end = on_validation_start, on_validation_end


class PassAtK(Callback):
    """Samples several answers to each prompt and measures pass@k.

    Args:
        samples: Number of answers per prompt.
        sampling: Settings for sampling the answers.
    """

    def __init__(self, samples: int, sampling: Sampling) -> None:
        self.samples, self.sampling = samples, sampling
        self.metrics: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and judges the answers while the student is on the device."""
        assert isinstance(pl_module, DistillModule)
        self.metrics, self.rows = sampled_passes(
            pl_module.writers.refreshed_student(),
            _held_out_prompts(trainer),
            pl_module.held_out.verifiers,
            self.sampling,
            self.samples,
        )

    on_test_end = on_validation_end


class HarnessTasks(Callback):
    """Measures the student on tasks of lm-evaluation-harness.

    Args:
        harness: The tasks to run.
    """

    def __init__(self, harness: Harness | None) -> None:
        self.harness = harness
        self.metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the tasks while the student is on the device."""
        assert self.harness is not None
        assert isinstance(pl_module, DistillModule)
        self.metrics = self.harness.run(pl_module.student, pl_module.tokenizer)

    on_test_end = on_validation_end


def _held_out_prompts(trainer: Trainer) -> Prompts:
    """The prompts of the split that is being evaluated."""
    return datamodule_of(trainer).prompts["val" if trainer.state.fn == "validate" else "test"]


def _teacher_model(pl_module: LightningModule) -> nn.Module:
    """The teacher's model.

    Raises:
        ConfigError: If it is not in this process.
    """
    assert isinstance(pl_module, DistillModule)
    assert pl_module.teacher is not None
    model = pl_module.teacher.model
    if model is None:
        raise ConfigError("--draft needs a teacher whose model is in this process: leave --draft out.")
    return model
