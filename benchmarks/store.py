"""Cost of the response store: time and memory of writing and reading many short responses, and bytes on disk.

Each phase is a process of its own. `write` makes responses one group at a time, as a generator would hand them over,
and stores each group as a shard; `open` reads the manifests and makes the index; `look up` asks which of all prompts
have no response; `read some` makes responses at random places; `read all` makes each once, in order, and lets it go.
`hold all` keeps them all as objects: what a store without an index would need. `verify` compares every file with its
checksum, and `merge` copies the store into a new one beside it.

    python benchmarks/store.py
    python benchmarks/store.py --responses 10000000 --group 1024

Memory is what a process holds for itself (RssAnon), sampled, less what it held before the phase; pages of mapped files
are the system's and given back when it needs them. Times are of a page cache that is warm after writing.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import TracebackType

from measure import Job, child_job, report, run_child
from results import add_output_options, table, write_json

from distillkit.storage import Provenance, ResponseStore, merge, verify
from distillkit.types import Response, Sampling

SOME = 10_000
"""Responses that are read at random places."""
PASS = 4096
"""Responses that are read at once where all are."""
PROVENANCE = Provenance("teacher", "0" * 16, Sampling(max_new_tokens=64), 0)
PHASES = ("write", "open", "look up", "read some", "read all", "hold all", "verify", "merge")


def main() -> None:
    """Runs and prints."""
    job = child_job()
    if job is not None:
        report(measured(job))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1_000_000, help="how many")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each")
    parser.add_argument("--group", type=int, default=128, help="responses of a shard; a run's are 128")
    parser.add_argument("--log-probs", action="store_true", help="with log-probabilities")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES, help="which phases")
    parser.add_argument(
        "--folder", help="where the store is made and left, or is already; a temporary folder is removed"
    )
    add_output_options(parser, "store.json")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("responses", "tokens", "group", "log_probs")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or f"{temporary}/store"
        rows = []
        for phase in options.phases:
            rows.append(run_child(__file__, {"phase": phase, "folder": folder, **settings}))
            print(" | ".join(cells(rows[-1])), file=sys.stderr)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    facts = {"bytes": size / options.responses, "raw_bytes": raw_bytes(options), "files": len(files)}
    write_json(options.json, rows, vars(options) | facts)
    print(
        f"{options.responses} responses of {options.tokens} tokens in {len(files)} files: {facts['bytes']:.0f} bytes "
        f"each on disk, {facts['raw_bytes']:.0f} of them id, tokens, log-probabilities and text.\n"
    )
    header = ("phase", "responses", "seconds", "CPU s", "CPU µs each", "memory MiB", "bytes each")
    print(table(header, [cells(row) for row in rows], options.markdown))


def measured(job: Job) -> Job:
    """Time and memory of one phase."""
    store = None if job["phase"] in ("open", "verify", "merge") else ResponseStore(job["folder"])
    if store is not None and job["phase"] != "write":
        store.read(PROVENANCE)  # opened before the clock starts
    named = job["phase"] in ("look up", "read all", "hold all")
    names = [name_of(number) for number in range(job["responses"])] if named else []
    with PrivateMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        count = run(job, store, names)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"phase": job["phase"], "count": count, "seconds": seconds, "cpu": cpu, "memory": memory.peak}


def run(job: Job, store: ResponseStore | None, names: list[str]) -> int:
    """Does the phase; how many responses it handled."""
    total, phase = job["responses"], job["phase"]
    if phase == "verify":
        assert not any(state.problem for state in verify(job["folder"])), "the store is whole"
        return total
    if phase == "merge":
        (line,) = merge(f"{job['folder']}-merged", [job["folder"]])
        assert f" {total} responses" in line, line
        return total
    if store is None:
        stored = ResponseStore(job["folder"]).read(PROVENANCE)
        assert len(stored) == total, "the store has them all"
        return total
    if phase == "write":
        for group in groups(job):
            store.write(PROVENANCE, group)
        return total
    stored = store.read(PROVENANCE)
    if phase == "look up":
        assert stored.missing([*names, "none"]) == ["none"], "the store has them all"
    elif phase == "read some":
        chosen = Random(1).sample(range(total), min(SOME, total))
        assert all(stored[name_of(number)].token_ids == tokens_of(number, job) for number in chosen), "as written"
        return len(chosen)
    elif phase == "read all":
        for start in range(0, total, PASS):
            for number, response in enumerate(stored.take(names[start : start + PASS]), start=start):
                assert response.token_ids == tokens_of(number, job), "as written"
    else:
        assert len(stored.take(names)) == total, "the store has them all"
    return total


def groups(job: Job) -> Iterator[list[Response]]:
    """The responses, a group at a time."""
    for start in range(0, job["responses"], job["group"]):
        yield [response(number, job) for number in range(start, min(start + job["group"], job["responses"]))]


def response(number: int, job: Job) -> Response:
    """A response whose content depends on its number alone."""
    tokens = tokens_of(number, job)
    log_probs = tuple(-0.5 for _ in tokens) if job["log_probs"] else ()
    return Response(name_of(number), tokens, text_of(job), "stop", log_probs)


def name_of(number: int) -> str:
    """An id as long as a prompt's."""
    return f"{number:032x}"


def tokens_of(number: int, job: Job) -> tuple[int, ...]:
    """Its token ids."""
    return tuple((number + offset) % 50_000 for offset in range(job["tokens"]))


def text_of(job: Job) -> str:
    """Four letters for each token."""
    return "word" * int(job["tokens"])


def raw_bytes(options: argparse.Namespace) -> int:
    """Bytes of what a response is, without columns, index and file."""
    return len(name_of(0)) + options.tokens * (4 + 4 + (4 if options.log_probs else 0))


class PrivateMemory:
    """The largest amount of memory that this process has for itself, in bytes, over what it had before."""

    def __enter__(self) -> "PrivateMemory":
        self._start = self._seen = private_bytes()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._sampler.join()
        self.peak = max(self._seen, private_bytes()) - self._start

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._seen = max(self._seen, private_bytes())


def private_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: memory needs Linux")


def cells(row: Job) -> list[str]:
    """A row of the table."""
    count = row["count"]
    return [
        row["phase"],
        f"{count}",
        f"{row['seconds']:.2f}",
        f"{row['cpu']:.2f}",
        f"{1e6 * row['cpu'] / count:.1f}",
        f"{row['memory'] / 2**20:.1f}",
        f"{row['memory'] / count:.0f}",
    ]


if __name__ == "__main__":
    main()
