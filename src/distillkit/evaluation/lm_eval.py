"""Evaluation on tasks of EleutherAI's lm-evaluation-harness."""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from distillkit.errors import ConfigError, check_range
from distillkit.models.structure import base_model
from distillkit.types import Tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Harness:
    """Tasks on which lm-eval evaluates a student (`pip install "distillkit[lm-eval]"`).

    Tasks that execute code written by the model are refused, as in the library.

    Args:
        tasks: Names of tasks or groups, as `lm-eval ls tasks` lists them.
        limit: Documents per task, at least 1; None evaluates all.
        fewshot: Examples per prompt; None is the task's default.
        batch_size: Sequences scored at once, at least 1.
        chat: Whether the tokenizer's chat template is applied.
        include: Folder with additional task definitions.

    Raises:
        ConfigError: If `tasks` is empty or a number is out of range.
    """

    tasks: list[str]
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    chat: bool = False
    include: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("Harness.tasks is empty: list at least one task; `lm-eval ls tasks` shows them.")
        check_range("Harness.limit", self.limit, 1)
        check_range("Harness.fewshot", self.fewshot, 0)
        check_range("Harness.batch_size", self.batch_size, 1)

    def check(self) -> None:
        """Refuses unknown tasks.

        Raises:
            ConfigError: If a task is unknown, or the library is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError('Tasks of lm-eval need its library: pip install "distillkit[lm-eval]".')
        manager = self._manager()
        unknown = [task for task in self.tasks if not manager.match_tasks([task])]
        if unknown:
            raise ConfigError(f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them.")

    def run(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, float]:
        """Returns the metrics of each task, as `TASK_METRIC`, with their standard errors.

        Args:
            model: A transformers causal language model, peft's or not.
            tokenizer: Its tokenizer.

        Raises:
            ConfigError: If the library can't run a task, for example because its data can't be loaded.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        base = base_model(model)
        lm = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=self.batch_size, device=str(base.device))
        try:
            output = simple_evaluate(
                lm,
                tasks=list(self.tasks),
                limit=self.limit,
                num_fewshot=self.fewshot,
                apply_chat_template=self.chat,
                task_manager=self._manager(),
                bootstrap_iters=1000,
                log_samples=False,
                verbosity="WARNING",
            )
        except Exception as error:
            raise ConfigError(f"lm-eval can't run {', '.join(self.tasks)}: {type(error).__name__}: {error}") from error
        metrics: dict[str, float] = {}
        for task, values in output["results"].items():
            for name, value in values.items():
                metric, _, kind = name.partition(",")
                if isinstance(value, int | float) and kind:
                    metrics[f"{task}_{metric}" + ("" if kind == "none" else f"_{kind}")] = float(value)
        return metrics

    def _manager(self) -> "TaskManager":
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include)
