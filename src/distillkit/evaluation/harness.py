"""Tasks of EleutherAI's lm-evaluation-harness, through its own library."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import nn

from distillkit.errors import ConfigError
from distillkit.models.scoring import base_model


@dataclass(frozen=True)
class Harness:
    """Tasks on which a student is measured by lm-eval (`pip install "distillkit[lm-eval]"`).

    Tasks that run the model's programs are refused, as the library does it.

    Args:
        tasks: Names of tasks or groups, as `lm-eval ls tasks` lists them.
        limit: Documents of each task; None takes all.
        fewshot: Examples in each prompt; None is as the task has it.
        batch_size: Sequences scored at once, at least 1.
        chat: Whether the tokenizer's chat template is applied.
        include: Folder with tasks of one's own.

    Raises:
        ConfigError: If no task is named or a number is out of range.
    """

    tasks: list[str]
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    chat: bool = False
    include: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("Harness.tasks is empty: name some, `lm-eval ls tasks` lists them.")
        for name, number, least in (
            ("limit", self.limit, 1),
            ("fewshot", self.fewshot, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if number is not None and number < least:
                raise ConfigError(f"Harness.{name} must be at least {least}, got {number}.")

    def check(self) -> None:
        """Refuses tasks that are unknown.

        Raises:
            ConfigError: If one is, or the library is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError('Tasks of lm-eval need its library: pip install "distillkit[lm-eval]".')
        known = self._manager()
        unknown = [task for task in self.tasks if not known.match_tasks([task])]
        if unknown:
            raise ConfigError(f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them.")

    def run(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        """The figures of each task, as `TASK_METRIC`, with their standard errors.

        Args:
            model: A transformers causal language model, peft's or not.
            tokenizer: Its tokenizer.

        Raises:
            ConfigError: If the library can't run a task, such as one whose data can't be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        base = base_model(model)
        lm = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=self.batch_size, device=str(base.device))
        try:
            found = simple_evaluate(
                lm, tasks=list(self.tasks), limit=self.limit, num_fewshot=self.fewshot, apply_chat_template=self.chat,
                task_manager=self._manager(), bootstrap_iters=1000, log_samples=False, verbosity="WARNING",
            )  # fmt: skip
        except Exception as error:
            raise ConfigError(f"lm-eval can't run {', '.join(self.tasks)}: {type(error).__name__}: {error}") from error
        figures: dict[str, float] = {}
        for task, values in found["results"].items():
            for name, value in values.items():
                metric, _, kind = name.partition(",")
                if isinstance(value, int | float) and kind:
                    figures[f"{task}_{metric}" + ("" if kind == "none" else f"_{kind}")] = float(value)
        return figures

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include)
