"""Fuzzers of configuration files: their YAML, their bases, and how several are merged."""

import random
from pathlib import Path

import yaml

from distillkit.comparison import plan
from distillkit.config import files
from distillkit.config.command import Command
from helpers.fuzzing import TEXTS, any_text, any_value, fuzz, mutated

CONFIG = """\
base: below.yaml
trainer:
  max_epochs: 1
  default_root_dir: ${config_dir}/run
  callbacks: [{class_path: RunCheckpoint}, {class_path: Answers, init_args: {shown: 0}}]
model: &model
  student: {source: small}
  loss: {class_path: SkewKL, init_args: {alpha: 1e-1}}
  teacher: TransformersTeacher
data.batch_size: 0x10
more: {<<: *model, date: 2026-01-01, empty: ~}
"""
BELOW = "trainer: {max_epochs: 2, accelerator: cpu}\nmodel: {loss: {class_path: ForwardKL}}\n"
COMPARISON = """\
title: Three
out: out
baseline: kd
seeds: [0, 1]
budget: {steps: 10}
common: {base: below.yaml, model: {student: {source: small}}, data: {train: a.jsonl, val: b.jsonl}}
warm_start: {budget: {steps: 2}, model: {loss: CrossEntropy}}
methods:
  kd: {model: {loss: {class_path: ForwardKL}}}
  skl: {model: {loss: {class_path: SkewKL, init_args: {alpha: 0.1}}}}
"""
PIECES = (
    *("base: ", "below.yaml", "mine.yaml", "[", "]", "{", "}", ": ", "\n", "\n  ", "- ", "&a ", "*a", "<<: *a", "!!"),
    *("!!python/object:os.system", "${config_dir}", "class_path", "init_args", "null", "~", "1e-3", "0x", "'", '"'),
    *("model", "data", "trainer", "---\n", "...\n", "pkg:", "pkg:distillkit/x.yaml", "a.b.c: 1", "? ", "|\n", "%YAML"),
)


def text(original: str, rng: random.Random) -> bytes:
    """A config file with some bytes changed, or made of pieces of YAML."""
    if rng.random() < 0.5:
        return mutated(original.encode(), rng)
    pieces = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))
    whole = original if rng.random() < 0.6 else ""
    cut = rng.randint(0, len(whole))
    return (whole[:cut] + pieces + whole[cut:]).encode("utf-8", "surrogatepass")


def test_any_text_is_a_configuration_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(BELOW)

    def load(data: bytes) -> None:
        (tmp_path / "mine.yaml").write_bytes(data)
        merged = files.load_all([str(tmp_path / "mine.yaml")])
        for key in ("model", "data", "trainer"):
            files.require_mapping(merged, key)
            merged.origin(f"{key}.loss.alpha")

    outcome = fuzz("config files", lambda rng: text(CONFIG, rng), load)
    assert outcome.accepted > 0
    assert outcome.refused["ConfigError"] > 0


KEYS = ("model", "loss", "class_path", "init_args", "base", "data", "a", "a.b", "callbacks")


def mapping(rng: random.Random, depth: int = 3) -> dict[str, object]:
    """Settings with the keys that mean something to merging, and wild values."""
    settings: dict[str, object] = {}
    for _ in range(rng.randrange(4)):
        key = rng.choice(KEYS)
        settings[key] = mapping(rng, depth - 1) if depth and rng.random() < 0.6 else any_value(rng, 1)
    return settings


def test_merging_loses_nothing_of_the_upper_file_and_changes_neither() -> None:
    def merge(pair: tuple[dict[str, object], dict[str, object]]) -> None:
        below, above = pair
        before = repr(pair)
        merged = files.merge(below, above)
        assert repr(pair) == before
        assert files.merge(merged, above) == merged or "nan" in before
        assert set(above) <= set(merged)
        assert files.merge({}, above) == above or "nan" in before
        assert files.merge(below, {}) == below or "nan" in before

    fuzz("merged settings", lambda rng: (mapping(rng), mapping(rng)), merge)


def test_any_settings_in_any_order_are_merged_or_refused(tmp_path: Path) -> None:
    def load(contents: list[dict[str, object]]) -> None:
        paths = [tmp_path / f"{number}.yaml" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(yaml.safe_dump(content, allow_unicode=True), errors="surrogatepass")
        files.load_all([str(path) for path in paths])

    outcome = fuzz("several files", lambda rng: [mapping(rng) for _ in range(rng.randint(1, 3))], load)
    assert outcome.accepted > 0


ARGUMENTS = (
    *("--config", "-c", "--config=", "-cx.yaml", "--model.loss", "--model.loss.alpha=1", "--data.train+=a", "--", "-"),
    *("--=", "--.=1", "--a..b=1", "--trainer.callbacks+", "{", "[1", "null", "--model.loss={a: 1", *TEXTS[:6]),
)


def test_any_arguments_are_a_command_or_refused() -> None:
    def run(arguments: list[str]) -> None:
        _, rest = files.split_arguments(arguments)
        command = Command(files.MergedConfig({"model": {"loss": "SkewKL"}, "data": []}), tuple(rest))
        command.content()
        command.located("model.loss.alpha")

    fuzz("arguments", lambda rng: [rng.choice(ARGUMENTS) for _ in range(rng.randint(0, 6))], run)


def test_any_text_is_a_comparison_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("trainer: {accelerator: cpu}\n")

    def read(data: bytes) -> None:
        (tmp_path / "compare.yaml").write_bytes(data)
        plan.read(str(tmp_path / "compare.yaml"))

    outcome = fuzz("comparisons", lambda rng: text(COMPARISON, rng), read)
    assert outcome.accepted > 0
    assert outcome.refused["ConfigError"] > 0


def test_any_values_are_a_comparison_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("trainer: {accelerator: cpu}\n")

    def replaced(rng: random.Random) -> dict[str, object]:
        content = yaml.safe_load(COMPARISON)
        for _ in range(rng.randint(1, 2)):
            holder = content
            while isinstance(holder[key := rng.choice(list(holder))], dict) and holder[key] and rng.random() < 0.6:
                holder = holder[key]
            holder[key] = any_value(rng, 2)
        if rng.random() < 0.2:
            content[any_text(rng, ("out", "methods", "slots", "gpus", "split", "keep"), 1)] = any_value(rng, 1)
        return content

    def read(content: dict[str, object]) -> None:
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), errors="surrogatepass")
        plan.read(str(tmp_path / "compare.yaml"))

    outcome = fuzz("values of comparisons", replaced, read)
    assert outcome.refused["ConfigError"] > 0
