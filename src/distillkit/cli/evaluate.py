"""The verb `evaluate`: what a trained student is worth, as a file."""

import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, Trainer
from torch import nn

from distillkit.cli import configs
from distillkit.cli.train import DistillCLI, launch
from distillkit.data.module import DistillData
from distillkit.errors import ConfigError
from distillkit.evaluation import report
from distillkit.evaluation.harness import Harness
from distillkit.evaluation.pass_at_k import sampled_passes
from distillkit.generators.speculative import SpeculativeGenerator
from distillkit.interfaces import Verifier
from distillkit.module import DistillModule
from distillkit.types import Sampling
from distillkit.verifiers.distinct import Distinct

METRICS: dict[str, Verifier] = {"distinct_2": Distinct(2)}
"""Judges of the answers, where `model.metrics` names none."""


def run(arguments: list[str]) -> int:
    """Runs `evaluate` with the arguments that follow it.

    Args:
        arguments: Those of `fit`, and of its own `--run FOLDER`, a run whose last checkpoint is measured with the
            configuration that it ran with, and `--student FOLDER`, a model in the place of the configured student.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    run_folder, rest = _taken(arguments, "--run")
    student, rest = _taken(rest, "--student")
    if run_folder is not None:
        rest = [*_of_run(Path(run_folder), with_checkpoint=student is None), *rest]
    adapt = partial(_with_student, source=student)
    # Lightning's, about a checkpoint's callbacks: measuring needs none of them.
    warnings.filterwarnings("ignore", r".*callbacks used to create the checkpoint.*")
    launch(EvaluateCLI, "evaluate", rest, adapt, trainer_class=EvaluationTrainer, save_config_callback=None)
    return 0


def _taken(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, the last one if there are several, and the other arguments."""
    value, rest = None, []
    items = iter(arguments)
    for argument in items:
        if argument == flag:
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{flag} needs the path of a folder.")
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
        else:
            rest.append(argument)
    return value, rest


def _of_run(folder: Path, with_checkpoint: bool) -> list[str]:
    """Arguments that stand for a run: its configuration, itself as run folder, and its last checkpoint."""
    config, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not config.is_file():
        raise ConfigError(f"--run {folder} is no folder of a run: it has no config.yaml.")
    found = ["--config", str(config), f"--trainer.default_root_dir={folder}"]
    if with_checkpoint:
        if not last.exists():
            raise ConfigError(
                f"--run {folder} has no checkpoint, {last}: name a model by --student FOLDER, or train with "
                "RunCheckpoint among trainer.callbacks."
            )
        found.append(f"--ckpt_path={last}")
    return found


def _with_student(config: configs.Config, source: str | None) -> configs.Config:
    """The configuration with a whole model in the place of its student, which may be pruned or have adapters."""
    if source is None:
        return config
    model = config.get("model", {})
    kept = {key: value for key, value in model.get("student", {}).items() if key in ("dtype", "attn_implementation")}
    return config | {"model": model | {"student": kept | {"source": source}}}


class EvaluationTrainer(Trainer):
    """A trainer that measures, and writes down what it found."""

    def evaluate(
        self,
        model: DistillModule,
        datamodule: DistillData,
        out: str | None = None,
        overwrite: bool = False,
        split: Literal["val", "test"] = "val",
        ckpt_path: str | None = None,
        draft: int = 0,
        samples: int = 0,
        sampling: Sampling | None = None,
        lm_eval: Harness | None = None,
    ) -> None:
        """Measures the student on held-out prompts; writes `evaluation.json` and `answers.jsonl`, and prints a table.

        Args:
            model: The models.
            datamodule: The prompts.
            out: Folder of what is written; null is `evaluation` in the run's folder.
            overwrite: Whether an earlier evaluation in that folder may be replaced.
            split: The prompts: `data.val` or `data.test`.
            ckpt_path: A checkpoint of a run; null takes the student as the configuration has it.
            draft: Tokens that the student drafts at once, while the teacher writes at temperature 1, to measure how
                many it accepts; 0 leaves it out. It takes as long as the teacher takes to answer the prompts.
            samples: Answers to draw to each prompt, besides the greedy one, for the pass@k of verifiers that give 0 or
                1; 0 draws none.
            sampling: How those are drawn; null is temperature 0.8 and top-p 0.95, as long as the greedy ones.
            lm_eval: Tasks of EleutherAI's lm-evaluation-harness to measure the student on as well.

        Raises:
            ConfigError: If the folder holds an evaluation, a teacher is needed to check drafts, samples have nobody to
                judge them, or a number is negative.
        """
        folder = Path(out) if out is not None else Path(self.default_root_dir) / "evaluation"
        if (folder / "evaluation.json").exists() and not overwrite:
            raise ConfigError(f"{folder} holds an evaluation already: name another by --out, or give --overwrite=true.")
        if draft < 0:
            raise ConfigError(f"--draft must be at least 0, got {draft}.")
        if draft and model.speaker is None:
            raise ConfigError("--draft needs a teacher that reads the student's tokens: leave it out.")
        if samples < 0 or (samples and model.held_out.verifiers == METRICS):
            raise ConfigError(
                f"--samples must be at least 0, got {samples}." if samples < 0
                else "--samples needs a verifier that says which answers are right: name one in model.metrics."
            )  # fmt: skip
        if lm_eval is not None:
            lm_eval.check()
        started = time.time()
        drafts, tasks = Drafts(draft), Tasks(lm_eval)
        passes = Passes(samples, sampling or Sampling(max_new_tokens=model.answers.max_new_tokens))
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]  # Lightning sets it through a connector
        callbacks += [own for own, wanted in ((drafts, draft), (passes, samples), (tasks, lm_eval)) if wanted]
        measure = self.validate if split == "val" else self.test
        measure(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=False)
        answers = model.held_out.table
        figures = {name.rpartition("/")[2]: value for name, value in model.history[-1].items()}
        step = int(figures.pop("step"))
        figures |= report.of_answers(answers) | drafts.figures | passes.figures | tasks.figures
        if samples:
            answers = [
                replace(own, figures=own.figures | counts) for own, counts in zip(answers, passes.rows, strict=True)
            ]
        found = {
            "student": ckpt_path or model.loader.source,
            "step": step,
            "teacher": getattr(model.teacher, "source", None),
            "split": split,
            "figures": figures,
            "num_prompts": len(answers),
            "num_positions": sum(answer.positions for answer in answers),
            "generated_tokens": sum(answer.tokens for answer in answers),
            "seconds": round(time.time() - started, 3),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        }
        report.write(folder, found, answers)
        print(f"{found['student']}, {len(answers)} prompts of data.{split}\n{report.table(figures)}\n{folder}")


class Drafts(Callback):
    """Has the teacher write what the student drafts, and counts what it accepts.

    Args:
        block: Tokens that are drafted at once.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.figures: dict[str, float] = {}

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses a teacher that can't check, before anything is measured."""
        if pl_module.teacher.model is None:
            raise ConfigError("--draft needs a teacher whose model is in this process: leave it out.")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """While both models are on the device."""
        teacher = pl_module.teacher.model
        generator = SpeculativeGenerator("exact", self.block, progress=False)
        generator.refresh(nn.ModuleDict({"student": pl_module.student, "teacher": teacher}), pl_module.tokenizer)
        prompts = trainer.datamodule.prompts["val" if trainer.state.fn == "validate" else "test"]
        generator.generate(prompts, Sampling(temperature=1.0, max_new_tokens=pl_module.answers.max_new_tokens))
        found = generator.figures()
        self.figures = {"drafted_acceptance": found["acceptance"], "tokens_per_check": found["tokens_per_check"]}

    on_test_start, on_test_end = on_validation_start, on_validation_end


class Passes(Callback):
    """Draws several answers to each prompt, and has them judged.

    Args:
        samples: Answers to each prompt.
        sampling: How they are drawn.
    """

    def __init__(self, samples: int, sampling: Sampling) -> None:
        self.samples, self.sampling = samples, sampling
        self.figures: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """While the student is on the device."""
        prompts = trainer.datamodule.prompts["val" if trainer.state.fn == "validate" else "test"]
        generator = pl_module.writers.refreshed_student()
        self.figures, self.rows = sampled_passes(
            generator, prompts, pl_module.held_out.verifiers, self.sampling, self.samples
        )  # fmt: skip

    on_test_end = on_validation_end


class Tasks(Callback):
    """Measures the student on tasks of another library.

    Args:
        harness: The tasks; None for none.
    """

    def __init__(self, harness: Harness | None) -> None:
        self.harness = harness
        self.figures: dict[str, float] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """While the student is on the device."""
        assert self.harness is not None
        self.figures = self.harness.run(pl_module.student, pl_module.tokenizer)

    on_test_end = on_validation_end


class EvaluateCLI(DistillCLI):
    """The same configuration as that of `fit`, on one device, with nothing that training needs."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one verb."""
        return {"evaluate": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer without callbacks, logs and checkpoints, on one device, which then has all prompts."""
        shown = ("logger", "enable_checkpointing", "enable_model_summary")
        one = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        whole = {"limit_val_batches": None, "limit_test_batches": None, "fast_dev_run": False}
        return super().instantiate_trainer(callbacks=[], **dict.fromkeys(shown, False), **one, **whole, **kwargs)

    def instantiate_classes(self) -> None:
        """The parts, with judges of the answers where none are named."""
        model = self._get(self.config, "model")
        super().instantiate_classes()
        if model.metrics is None:
            self.model.held_out.judge(METRICS)
