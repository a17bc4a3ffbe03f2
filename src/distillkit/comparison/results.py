"""Types of a comparison's results: the nested mapping that every report shows and `results.json` stores."""

from typing import NotRequired, TypedDict


class MetricDifference(TypedDict):
    """The paired difference of a method from the baseline in one metric."""

    mean: float
    low: float  # lower end of the bootstrap interval
    high: float  # upper end
    sure: bool  # whether the interval excludes 0


class MetricResult(TypedDict):
    """One metric of one method."""

    mean: float
    deviation: float  # standard deviation over seeds; NaN for a single seed
    values: list[float]  # one per seed
    best: bool  # whether it is better than every other method, with intervals that exclude 0
    difference: NotRequired[MetricDifference]


class MethodResult(TypedDict):
    """All results of one method."""

    name: str
    runs: dict[int, str]  # seed to status
    errors: dict[int, str]  # seed to error, of the runs that failed
    metrics: dict[str, MetricResult]  # by metric name
    cost: dict[str, float]  # means over seeds


class AnswerRow(TypedDict):
    """One held-out prompt with the answer of each method."""

    earlier: list[dict[str, str]]  # turns before the prompt, each with role and content
    prompt: str
    reference: str
    gold: str  # the data's own answer beside the teacher's; empty if there is none
    answers: dict[str, str]  # by method name


class About(TypedDict):
    """The facts about a comparison that do not come from its runs."""

    title: str
    budget: dict[str, float]
    seeds: list[int]
    split: str
    student: str
    date: str
    machine: str
    commit: str
    command: str
    cost_note: str


class Results(About):
    """The results of a comparison."""

    schema: int
    baseline: str
    num_prompts: int
    teacher: str | None
    versions: dict[str, str]
    metrics: list[str]  # names of the metrics, in the order of the table's columns
    start: dict[str, float]  # metrics of the common initial student
    methods: list[MethodResult]
    answers: list[AnswerRow]
