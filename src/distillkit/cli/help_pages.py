"""Help of the verbs that take a run's settings, on one screen each: the options, and the keys that most runs set.

The pages are written out, so that they appear at once; a test compares them with the verbs' parsers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from distillkit.errors import ConfigError

SECTIONS = ("model", "data", "trainer", "all")
"""Topics of the help that lists every key, as in `--help.model`."""

Row = tuple[str, str, str]
"""An option or a key, its default, and what it does."""


@dataclass(frozen=True)
class Page:
    """The help of a verb.

    Args:
        purpose: What the verb does.
        options: Options that only this verb has.
        keys: Keys that most runs set.
        examples: Command lines.
    """

    purpose: str
    options: tuple[Row, ...]
    keys: tuple[Row, ...]
    examples: tuple[str, ...]


_FILES: tuple[Row, ...] = (
    ("--config FILE, -c", "", "settings as YAML; of several, later ones win"),
    ("--method NAME", "", "one of `distillkit methods`, below the files"),
)
_SHOW: Row = ("--print_config", "", "print every setting with its value, and end")
_CHECKPOINT: Row = ("--ckpt_path PATH", "none", "checkpoint to measure; `last` is the newest")

_STUDENT: Row = ("model.student.source", "required", "hub id, folder, GGUF, wheel:...")
_TEACHER: Row = ("model.teacher", "none", "TransformersTeacher, CachedTeacher")
_TEACHER_SOURCE: Row = ("model.teacher.source", "required", "as above; of a TransformersTeacher")
_LOSS: Row = ("model.loss", "required", "ForwardKL, ...; or from --method")
_CURATOR: Row = ("model.curator", "DatasetCurator", "who writes the responses")
_TRAIN: Row = ("data.train", "required", "JSONL: prompt or messages, response")
_VAL: Row = ("data.val", "none", "held-out prompts")
_BATCH: Row = ("data.batch_size", "8", "prompts per micro-batch and device")
_ACCELERATOR: Row = ("trainer.accelerator", "auto", "cpu, gpu, mps")
_DEVICES: Row = ("trainer.devices", "auto", "number of GPUs or processes")
_FOLDER: Row = ("trainer.default_root_dir", "runs/default", "the run's folder")
_MEASURED = (_STUDENT, _TEACHER, _VAL, ("data.test", "none", "prompts of the split `test`"))

PAGES: dict[str, Page] = {
    "fit": Page(
        "Trains a student. Settings come from YAML files; `--KEY VALUE` overrides them.",
        (
            *_FILES,
            ("--ckpt_path PATH", "none", "go on from a checkpoint; `last` is the newest"),
            ("--weights_only BOOL", "none", "false: the checkpoint may run code of its own"),
            _SHOW,
        ),
        (
            _STUDENT,
            ("model.student.keep_layers", "all", "layers to keep, such as [0,1,29]"),
            _TEACHER,
            _TEACHER_SOURCE,
            _LOSS,
            _CURATOR,
            ("model.optimizer.lr", "2.0e-05", "learning rate"),
            _TRAIN,
            _VAL,
            _BATCH,
            ("trainer.max_epochs", "required", "or max_steps; base.yaml: 2"),
            _DEVICES,
            ("trainer.precision", "32-true", "base.yaml: bf16-mixed"),
            _FOLDER,
        ),
        (
            "--config distillkit:quickstart.yaml",
            "--config run.yaml --method gkd --model.optimizer.lr 1e-5",
            "--config run.yaml --ckpt_path last --trainer.max_epochs 3",
        ),
    ),
    "curate": Page(
        "Generates the responses that `fit` needs before its first step, and stores them.",
        (
            *_FILES,
            ("--score", "false", "let a CachedTeacher score the responses too"),
            ("--shard I/N", "none", "generate one part of N, such as 3/8"),
            ("--workers N", "none", "generate with N processes of a Ray cluster"),
            ("--gpus_per_worker N", "none", "GPUs of each; by default one if there are any"),
            ("--cpus_per_worker N", "1.0", "CPUs of each"),
            ("--ray_address URL", "none", "the cluster; by default a new one here"),
            _SHOW,
        ),
        (_STUDENT, _TEACHER, _TEACHER_SOURCE, _LOSS, _CURATOR, _TRAIN, _VAL, _DEVICES, _FOLDER),
        (
            "--config run.yaml --method seqkd",
            "--config run.yaml --shard 3/8",
            "--config run.yaml --workers 8 --gpus_per_worker 1",
        ),
    ),
    "validate": Page(
        "Measures a checkpoint, or the student as configured, on the validation prompts.",
        (
            *_FILES,
            _CHECKPOINT,
            ("--verbose BOOL", "true", "print the metrics"),
            ("--weights_only BOOL", "none", "false: the checkpoint may run code of its own"),
            _SHOW,
        ),
        (*_MEASURED[:3], _LOSS, _TRAIN, _ACCELERATOR, _FOLDER),
        ("--config runs/x/config.yaml --ckpt_path last", "--config run.yaml --method kd"),
    ),
    "test": Page(
        "Measures a checkpoint, or the student as configured, on the test prompts.",
        (
            *_FILES,
            _CHECKPOINT,
            ("--verbose BOOL", "true", "print the metrics"),
            ("--weights_only BOOL", "none", "false: the checkpoint may run code of its own"),
            _SHOW,
        ),
        (*_MEASURED, _LOSS, _TRAIN, _ACCELERATOR, _FOLDER),
        ("--config runs/x/config.yaml --ckpt_path last", "--config run.yaml --method kd --data.test test.jsonl"),
    ),
    "evaluate": Page(
        "Measures a student on held-out prompts; writes the metrics and all answers.",
        (
            ("--run FOLDER", "", "a run: its settings and its last checkpoint"),
            ("--student FOLDER", "", "measure this model in the student's stead"),
            *_FILES,
            _CHECKPOINT,
            ("--split val|test", "val", "the prompts: data.val or data.test"),
            ("--out FOLDER", "none", "by default `evaluation` in the run's folder"),
            ("--overwrite", "false", "replace an earlier evaluation in that folder"),
            ("--draft N", "0", "measure acceptance of N drafted tokens"),
            ("--samples N", "0", "answers per prompt for pass@k"),
            ("--sampling.KEY VALUE", "none", "by default temperature 0.8, top_p 0.95"),
            ("--lm_eval.tasks LIST", "none", "tasks of lm-evaluation-harness"),
            _SHOW,
        ),
        (*_MEASURED, ("model.metrics", "none", "verifiers of the answers, by name"), _ACCELERATOR),
        (
            "--run runs/x",
            "--run runs/x --split test --samples 8 --overwrite",
            "--config run.yaml --student ./model --out results",
        ),
    ),
}


def topic(arguments: list[str]) -> str | None:
    """The topic of the help that the arguments ask for: empty for `--help`, `model` for `--help.model`; None for none.

    Raises:
        ConfigError: If there is no such topic.
    """
    for argument in arguments:
        if argument in ("-h", "--help"):
            return ""
        if argument.startswith("--help."):
            name = argument.removeprefix("--help.")
            if name not in SECTIONS:
                raise ConfigError(f"There is no help on {name!r}. Use one of --help.{', --help.'.join(SECTIONS)}.")
            return name
    return None


def page(verb: str) -> str:
    """The help of a verb, for a terminal of 80 columns."""
    content = PAGES[verb]
    usage = "[--config FILE | --run FOLDER]" if verb == "evaluate" else "--config FILE [--method NAME]"
    lines = [f"usage: distillkit {verb} {usage} [--KEY VALUE ...]", "", content.purpose, "", "Options, and defaults:"]
    lines += _rows(content.options, 21, 5)
    lines += ["", "Keys that most runs set, and defaults:", *_rows(content.keys, 25, 14)]
    lines += ["", "Examples:", *(f"  distillkit {verb} {example}" for example in content.examples), "", "More:"]
    lines += [
        f"  distillkit {verb} --help.model       all its keys; also .data .trainer .all",
        f"  distillkit {verb} --model.loss.help  all losses; and a NAME: its settings",
    ]
    return "\n".join(lines)


def _rows(rows: tuple[Row, ...], *widths: int) -> Iterator[str]:
    for row in rows:
        yield "  " + "  ".join([*map(str.ljust, row[:2], widths), row[2]])
