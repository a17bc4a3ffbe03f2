"""Fuzzers of what goes into stores and of small files of runs: wild responses, damaged stores in merges and exports."""

import json
import random
from pathlib import Path

from distillkit.comparison import outcome as outcomes
from distillkit.errors import StoreError
from distillkit.storage.admission import fault
from distillkit.storage.manifest import encode_manifest, parse_manifest
from distillkit.storage.merge import merge
from distillkit.storage.responses import ResponseStore
from distillkit.storage.verify import verify
from distillkit.types import Prompt, Response
from helpers.fuzzing import NUMBERS, any_text, any_value, fuzz, mutated
from helpers.stored_files import PROVENANCE, sign, write_store


def response(rng: random.Random, name: str) -> Response:
    """A response with wild values, or a sound one."""
    tokens = tuple(range(rng.randrange(5)))
    sound = Response(name, tokens, "four", "stop", tuple(-0.5 for _ in tokens))
    if rng.random() < 0.4:
        return sound
    values = dict(vars(sound)) if hasattr(sound, "__dict__") else {f: getattr(sound, f) for f in sound.__slots__}
    chosen = rng.choice(("prompt_id", "token_ids", "text", "finish", "log_probs"))
    wild = any_value(rng, 1)
    values[chosen] = tuple(wild) if isinstance(wild, list) else rng.choice((wild, (rng.choice(NUMBERS),) * len(tokens)))
    return Response(**values)


def test_what_a_store_admits_it_gives_back(tmp_path: Path) -> None:
    store, count = ResponseStore(tmp_path), 0

    def put(responses: list[Response]) -> None:
        nonlocal count
        count += 1
        named = [
            Response(f"{count}-{number}", one.token_ids, one.text, one.finish, one.log_probs)
            if isinstance(one.prompt_id, str) and not fault(one)
            else one
            for number, one in enumerate(responses)
        ]
        sound = [one for one in named if not fault(one)]
        try:
            store.write(PROVENANCE, named)
        finally:
            stored = store.read(PROVENANCE).take([one.prompt_id for one in sound])
            assert [one.token_ids for one in stored] == [tuple(one.token_ids) for one in sound]
            assert [one.text for one in stored] == [one.text for one in sound]

    found = fuzz("responses", lambda rng: [response(rng, f"{rng.random()}") for _ in range(rng.randint(1, 3))], put)
    assert found.accepted > 0
    assert found.refused["StoreError"] > 0


def test_any_response_has_a_fault_or_none() -> None:
    prompt = Prompt("a", ({"role": "user", "content": "Hi"},), (1,))
    fuzz("faults", lambda rng: response(rng, "a"), lambda one: fault(one, prompt).encode())


def test_a_damaged_store_is_never_merged_and_the_target_stays_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_store(source)
    write_store(target)
    whole = {file: file.read_bytes() for file in source.rglob("*") if file.is_file() and not file.name.startswith(".")}
    content = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}

    def change(rng: random.Random) -> tuple[Path, bytes, bool]:
        file = rng.choice(sorted(whole))
        return file, mutated(whole[file], rng), rng.random() < 0.5

    def run(change: tuple[Path, bytes, bool]) -> None:
        file, data, is_signed = change
        file.write_bytes(data)
        if is_signed:
            sign(file, source)
        try:
            merge(str(target), [str(source)])
            is_same = data == whole[file] or (file.suffix == ".json" and json.loads(data) == json.loads(whole[file]))
            assert is_signed or is_same, "a damaged store was merged"
        finally:
            for path, saved in whole.items():
                path.write_bytes(saved)
            assert is_signed or all(path.read_bytes() == saved for path, saved in content.items())
            for path in {*target.rglob("*")} - {*content}:
                if path.is_file() and not path.name.startswith("."):
                    path.unlink()
            for path, saved in content.items():
                path.write_bytes(saved)

    found = fuzz("merges", change, run)
    assert found.refused["StoreError"] > 0


def test_verification_ends_whatever_a_folder_holds(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    files = sorted(file for file in (tmp_path / "store").rglob("*") if file.is_file() and file.suffix)
    whole = {file: file.read_bytes() for file in files}

    def run(change: tuple[Path, bytes]) -> None:
        file, data = change
        file.write_bytes(data)
        sign(file, tmp_path / "store")
        try:
            for state in verify(str(tmp_path)):
                assert "\n" not in state.problem
        finally:
            for path, saved in whole.items():
                path.write_bytes(saved)

    fuzz("verification", lambda rng: (file := rng.choice(files), mutated(whole[file], rng)), run)


MANIFEST = {"schema": 3, "provenances": {}, "shards": [{"file": "shards/a.arrow", "responses": 1}]}


def test_any_manifest_is_read_or_refused() -> None:
    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated(encode_manifest(MANIFEST), rng)
        return encode_manifest({**MANIFEST, any_text(rng, ("schema", "shards", "x"), 1): any_value(rng)})

    found = fuzz("manifests", make, lambda data: parse_manifest(data, "a.json", 3, "store"))
    assert found.accepted > 0
    assert found.refused["StoreError"] > 0


ANSWER = {"prompt_id": "a", "tokens": 3, "finish": "stop", "positions": 2, "metrics": {"kl": 0.5}}
RUN_FILES = {
    "usage.json": {"spent_tokens": 10, "spent_seconds": 2.0},
    "fitted.json": {"wall_seconds": 2.0},
    "failed.json": {"error": "x"},
    "schedules.json": ["alpha"],
    "evaluation/evaluation.json": {"metrics": {"kl": 0.5}, "num_prompts": 1, "teacher": "t", "versions": {}},
    "evaluation/answers.jsonl": ANSWER | {"prompt": "Why?", "reference": "So.", "student": "No."},
}


def test_any_file_of_a_run_is_read_or_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    whole = {name: json.dumps(content).encode() + b"\n" for name, content in RUN_FILES.items()}

    def change(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(sorted(whole))
        content = RUN_FILES[name]
        if rng.random() < 0.5 or not isinstance(content, dict):
            return name, mutated(whole[name], rng)
        changed = {**content, rng.choice(list(content)): any_value(rng)}
        return name, json.dumps(changed).encode() + b"\n"

    def read(change: tuple[str, bytes]) -> None:
        for name, data in whole.items():
            (tmp_path / name).write_bytes(change[1] if name == change[0] else data)
        found = outcomes.read(tmp_path, "kd", 0)
        assert found.status in ("done", "failed", "unfinished", "damaged")
        if found.status == "done":
            found.by_prompt("kl")
            outcomes.write_tables(tmp_path, [found])
        if found.status == "damaged":
            raise StoreError(found.error)

    found = fuzz("files of a run", change, read)
    assert found.accepted > 0
    assert found.refused["StoreError"] > 0
