"""Parts, cases and outcomes: plain values, so that planning and reporting import no model library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
"""One line of a result: plain values. `figure` is the text that stands for it on the last screen."""

Status = Literal["passed", "failed", "not run", "left out"]

OUT_OF_TIME = "out of time"


class LeftOutError(Exception):
    """A case that does not apply to this machine; the message says why."""


class OutOfTimeError(Exception):
    """A case that ended before it was done, because its time was up."""


class CaseError(Exception):
    """A case whose result is wrong; the message says all, and no traceback is needed."""


@dataclass(frozen=True)
class Case:
    """One measurement or check.

    Args:
        name: Name within its part.
        function: `module:function`. It is called with `Settings` and `arguments`, and yields rows.
        arguments: Keyword arguments, plain values.
        needs: Modules without which the case is left out.
        limit: Seconds after which the case has failed.
        least: Seconds that must be left for the case to begin.
        anchor: A key of `anchors.ANCHORS`.
        alone: Whether the process ends with the case: it leaves something behind that would change the next one.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    limit: float = 120.0
    least: float = 5.0
    anchor: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Part:
    """Cases that share a table, the most important first.

    Args:
        name: Name on the command line.
        title: Heading of its table.
        share: Share of the time that is left, relative to those of the parts that follow.
        cases: The cases.
    """

    name: str
    title: str
    share: float
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Settings:
    """Settings shared by all cases.

    Args:
        out: Folder of the results.
        device: `cuda` or `cpu`.
        tiny: Whether sizes are so small that they say nothing about speed.
        real: Source of a real model, as `distillkit.Student` takes it; None if there is none.
        seconds: Time that the case has.
    """

    out: str
    device: str
    tiny: bool = False
    real: str | None = None
    seconds: float = 60.0


@dataclass
class Outcome:
    """Outcome of a case.

    Args:
        part: Name of its part.
        case: Its name.
        status: `passed`, `failed`, `not run` or `left out`.
        reason: Why it did not pass.
        seconds: Time that it took.
        rows: Its results, also those before a failure.
        detail: Traceback, or the end of what the process printed.
        anchor: A key of `anchors.ANCHORS`.
        alone: Whether the process ends with the case: it leaves something behind that would change the next one.
    """

    part: str
    case: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    detail: str = ""
    anchor: str | None = None
    alone: bool = False

    @property
    def figure(self) -> str:
        """The main figure of the last row that has one."""
        return next((str(row["figure"]) for row in reversed(self.rows) if row.get("figure")), "")
