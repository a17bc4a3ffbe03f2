"""Fuzzers of model folders: damaged files and wild settings are read, or refused in one line that names the folder."""

import json
import random
import warnings
from pathlib import Path

import pytest

from distillkit.models.loading import load_model
from distillkit.models.tokenizers import load_tokenizer
from helpers.fuzzing import any_value, fuzz, mutated
from helpers.models import save_tiny

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def changed(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, or a JSON file with one value replaced."""
    if not name.endswith(".json") or rng.random() < 0.4:
        return mutated(data, rng)
    content = json.loads(data)
    content[rng.choice(list(content))] = any_value(rng, 1)
    return json.dumps(content).encode()


def read_all(folder: Path, names: tuple[str, ...], part: str) -> None:
    whole = {name: (folder / name).read_bytes() for name in names}

    def make(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(names)
        return name, changed(name, whole[name], rng)

    def read(change: tuple[str, bytes]) -> None:
        (folder / change[0]).write_bytes(change[1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_model(str(folder), "float32") if part == "model" else load_tokenizer(str(folder))
        finally:
            for name, data in whole.items():
                (folder / name).write_bytes(data)

    outcome = fuzz(f"{part} folders", make, read, seconds=20)
    assert outcome.accepted > 0
    assert outcome.refused["ModelError"] > 0


@pytest.mark.parametrize(("part", "names"), [("model", MODEL_FILES), ("tokenizer", TOKENIZER_FILES)])
def test_a_damaged_folder_is_read_or_refused_in_one_line(part: str, names: tuple[str, ...], tmp_path: Path) -> None:
    read_all(save_tiny(tmp_path / "model"), names, part)
