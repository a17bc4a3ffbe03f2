"""Evaluation: measures a trained student on held-out prompts and writes the results to files."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, Trainer

from distillkit.config.files import Config
from distillkit.errors import ConfigError
from distillkit.evaluation import report
from distillkit.evaluation.lm_eval import Harness
from distillkit.interfaces import Verifier
from distillkit.run_folder import CONFIG, EVALUATION, METRICS, last_checkpoint
from distillkit.storage.locks import FolderLock
from distillkit.training.datamodule import DistillData
from distillkit.training.module import DistillModule
from distillkit.types import Sampling
from distillkit.verifiers.distinct import Distinct
from distillkit.workflows.launch import DistillCLI, launch
from distillkit.workflows.measures import DraftAcceptance, HarnessTasks, PassAtK

DEFAULT_VERIFIERS: dict[str, Verifier] = {"distinct_2": Distinct(2)}
"""Verifiers of the student's answers if `model.metrics` names none."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Args:
        folder: Folder with `evaluation.json` and `answers.jsonl`.
        results: Content of `evaluation.json`.
    """

    folder: Path
    results: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The held-out metrics."""
        metrics: Mapping[str, float] = self.results["metrics"]
        return metrics


def evaluate(
    *configs: str | Path,
    run: str | Path | None = None,
    student: str | Path | None = None,
    arguments: Sequence[str] = (),
) -> Evaluation:
    """Measures a student on held-out prompts, and writes `evaluation.json` and `answers.jsonl`.

    Args:
        configs: Configuration files, later ones over earlier ones.
        run: Folder of a run, whose last checkpoint is measured with the run's configuration.
        student: Folder of a model to measure instead of the configured student.
        arguments: Further settings as on the command line, such as `--split=test`.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    rest = [*(f"--config={path}" for path in configs), *arguments]
    if run is not None:
        rest = [*_run_arguments(Path(run), with_checkpoint=student is None), *rest]
    adapt = partial(_with_student, source=None if student is None else str(student))
    # Lightning warns that callbacks of the checkpoint are missing: an evaluation needs none of them.
    warnings.filterwarnings("ignore", r".*callbacks used to create the checkpoint.*")
    cli = launch(EvaluateCLI, "evaluate", rest, adapt, trainer_class=EvaluationTrainer)
    trainer = cli.trainer
    assert isinstance(trainer, EvaluationTrainer)
    assert trainer.evaluation is not None
    return trainer.evaluation


def _run_arguments(folder: Path, with_checkpoint: bool) -> list[str]:
    """Command-line arguments for a run: its configuration, its folder, and its last checkpoint."""
    config, last = folder / CONFIG, last_checkpoint(folder)
    if not config.is_file():
        raise ConfigError(f"--run {folder} is not the folder of a run: it has no config.yaml.")
    arguments = ["--config", str(config), f"--trainer.default_root_dir={folder}"]
    if with_checkpoint:
        if not last.exists():
            raise ConfigError(
                f"--run {folder} has no checkpoint {last}: name a model with --student FOLDER, or train with "
                "RunCheckpoint in trainer.callbacks."
            )
        arguments.append(f"--ckpt_path={last}")
    return arguments


def _with_student(config: Config, source: str | None) -> Config:
    """The configuration with the model in `source` as the student, without the pruning and adapters of the original."""
    if source is None:
        return config
    model = config.get("model", {})
    original = model.get("student") or {}
    loading = {key: original[key] for key in _LOADING if key in original}
    return config | {"model": model | {"student": loading | {"source": source}}}


_LOADING = ("dtype", "attn_implementation", "trust_remote_code", "chat_template", "template_kwargs")
"""Settings of a student that also hold for another model in its stead."""


class EvaluationTrainer(Trainer):
    """A trainer that evaluates the student and writes the results."""

    evaluation: Evaluation | None = None
    """The result, once the evaluation is done."""

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
            out: Folder for the results; null is `evaluation` in the run's folder.
            overwrite: Whether to replace an earlier evaluation in that folder.
            split: The prompts: `data.val` or `data.test`.
            ckpt_path: A checkpoint of a run; null measures the student as configured.
            draft: Number of tokens that the student drafts at once, to measure how many the teacher accepts at
                temperature 1; 0 skips this. It takes as long as the teacher needs to answer the prompts.
            samples: Number of answers to sample per prompt, besides the greedy one, for the pass@k of verifiers that
                return 0 or 1; 0 samples none.
            sampling: Settings for sampling these answers; null is temperature 0.8 and top-p 0.95, with the same maximum
                length as the greedy answers.
            lm_eval: Tasks of EleutherAI's lm-evaluation-harness on which to measure the student as well.

        Raises:
            ConfigError: If the folder contains an evaluation already, another process is writing one to it, `draft` is
                set without a teacher that can verify drafts, `samples` is set without a verifier, or a number is
                negative.
        """
        folder = Path(out) if out is not None else Path(self.default_root_dir) / EVALUATION
        _check(model, draft, samples)
        if lm_eval is not None:
            lm_eval.check()
        with FolderLock(folder):
            if (folder / METRICS).exists() and not overwrite:
                raise ConfigError(
                    f"{folder} contains an evaluation already. Choose another folder with --out, or replace the "
                    "evaluation with --overwrite."
                )
            started = time.time()
            drafts, tasks = DraftAcceptance(draft), HarnessTasks(lm_eval)
            passes = PassAtK(samples, sampling or Sampling(max_new_tokens=model.answers.max_new_tokens))
            callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # Lightning sets it through a connector
            requested = ((drafts, draft), (passes, samples), (tasks, lm_eval))
            callbacks += [measure for measure, setting in requested if setting]
            run_split = self.validate if split == "val" else self.test
            run_split(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)
            results = _results(model, ckpt_path, split, started, drafts.metrics | passes.metrics | tasks.metrics)
            answers = model.held_out.table
            if samples:
                answers = [
                    replace(answer, metrics=answer.metrics | counts)
                    for answer, counts in zip(answers, passes.rows, strict=True)
                ]
            report.write(folder, results, answers)
        self.evaluation = Evaluation(folder, results)


def _check(model: DistillModule, draft: int, samples: int) -> None:
    """Checks that the requested measurements are possible.

    Raises:
        ConfigError: If one is not.
    """
    if draft < 0:
        raise ConfigError(f"--draft must be at least 0, got {draft}.")
    if draft and model.same_vocab_teacher is None:
        raise ConfigError("--draft needs a teacher with the student's vocabulary: leave --draft out.")
    if samples < 0:
        raise ConfigError(f"--samples must be at least 0, got {samples}.")
    if samples and model.held_out.verifiers == DEFAULT_VERIFIERS:
        raise ConfigError("--samples needs a verifier that tells which answers are correct: add one to model.metrics.")


def _results(
    model: DistillModule, checkpoint: str | None, split: str, started: float, measured: Mapping[str, float]
) -> dict[str, Any]:
    """The content of `evaluation.json`."""
    answers = model.held_out.table
    metrics = {name.rpartition("/")[2]: value for name, value in model.history[-1].items()}
    step = int(metrics.pop("step"))
    return {
        "student": checkpoint or model.student_spec.source,
        "step": step,
        "teacher": None if model.teacher is None else model.teacher.display_name,
        "split": split,
        "metrics": {**metrics, **report.answer_metrics(answers), **measured},
        "num_prompts": len(answers),
        "num_positions": sum(answer.positions for answer in answers),
        "generated_tokens": sum(answer.tokens for answer in answers),
        "seconds": round(time.time() - started, 3),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
    }


class EvaluateCLI(DistillCLI):
    """Command line of the verb `evaluate`, with the same configuration as `fit`, on one device."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb `evaluate`."""
        return {"evaluate": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """The trainer without callbacks, loggers and checkpoints, on one device, so that it sees all prompts."""
        disabled = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
        one_device = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        no_limits = {"limit_val_batches": None, "limit_test_batches": None, "fast_dev_run": False}
        return super().instantiate_trainer(callbacks=[], **disabled, **one_device, **no_limits, **kwargs)

    def instantiate_classes(self) -> None:
        """Builds the parts, with the default verifiers if the configuration names none."""
        model = self._get(self.config, "model")
        super().instantiate_classes()
        if model.metrics is None:
            self.model.held_out.set_verifiers(DEFAULT_VERIFIERS)
