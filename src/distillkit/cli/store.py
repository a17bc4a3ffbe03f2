"""`distillkit store info | show | merge | export | verify`: response stores; imports neither torch nor lightning."""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distillkit.errors import ConfigError, StoreError, readable
from distillkit.storage.index import Catalog
from distillkit.storage.rows import chosen_keys, open_store, stored_rows
from distillkit.storage.shards import PROMPTS

HEADER = ("WRITER", "MODEL", "ROUND", "SAMPLING", "RESPONSES", "TOKENS", "CUT", "SHARDS", "SIZE")


Handler = Callable[[argparse.Namespace], Sequence[str]]
"""Executes a verb and returns the lines to print."""


def run(argv: list[str]) -> int:
    """Runs `distillkit store` and prints its output.

    Args:
        argv: Command-line arguments after `distillkit store`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If an argument is invalid.
        StoreError: If a store is missing or damaged, or stores can't be merged; the exit status is then 1.
    """
    arguments = _parser().parse_args(argv)
    print("\n".join(arguments.function(arguments)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit store",
        description="Inspects, merges, exports and verifies stores.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str, function: Handler, *positionals: tuple[str, str]) -> argparse.ArgumentParser:
        subparser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        for positional, description in positionals:
            subparser.add_argument(positional, metavar=positional.upper(), help=description)
        subparser.set_defaults(function=function)
        return subparser

    path = ("path", "the store, or the run that has it: a folder, or another fsspec address such as s3://…")
    info = verb("info", "count the responses and tokens of each writer, model and round", _info, path)
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    show = verb("show", "print some responses with their prompts", _show, path)
    show.add_argument("--prompt", help="only responses to prompts whose id starts with this text")
    show.add_argument("--limit", type=int, default=5, help="maximum number of responses (5)")
    merge = verb("merge", "copy the content of several stores into one", _merge, ("target", "the store to add to"))
    merge.add_argument("sources", metavar="SOURCE", nargs="+", help="a store to copy from")
    export = verb("export", "write responses as conversations to train on", _export, path)
    export.add_argument("out", metavar="OUT", type=Path, help="a new file, .jsonl or .jsonl.gz, or a new folder")
    export.add_argument(
        "--format", choices=("jsonl", "datasets"), default="jsonl", help="datasets: a folder for the hub"
    )
    export.add_argument("--ended", action="store_true", help="leave out truncated responses")
    export.add_argument("--held-out", action="store_true", help="include the references of held-out prompts")
    export.add_argument("--tokens", action="store_true", help="include token ids and the writer's log-probabilities")
    root = ("path", "a store, a teacher cache, a run, or any folder above these; or the address of a store")
    verify = verb("verify", "read every stored file and checkpoint, and say which are damaged", _verify, root)
    verify.add_argument("--all", action="store_true", help="also name the files that are whole")
    for subparser in (show, export):
        subparser.add_argument("--writer", help="only responses by this writer, such as teacher")
        subparser.add_argument("--round", type=int, help="only responses of this round")
    return parser


def _info(arguments: argparse.Namespace) -> list[str]:
    catalog = open_store(arguments.path)
    facts = list(_facts(catalog))
    prompts = len(catalog.index(PROMPTS))
    if arguments.json:
        return [json.dumps({"provenances": facts, "prompts": prompts}, indent=2, ensure_ascii=False)]
    lines = _table([HEADER, *(_cells(fact) for fact in facts)], shutil.get_terminal_size((_UNLIMITED, 1)).columns)
    responses, size = (sum(fact[name] for fact in facts) for name in ("responses", "bytes"))
    held_out = sum(fact["held_out"] for fact in facts)
    notes = f" ({held_out} to held-out prompts)" if held_out else ""
    return [*lines, f"{responses} responses{notes}, {_size(size)}; the messages of {prompts} prompts"]


_UNLIMITED = 10_000
"""Columns of an output that is no terminal."""


def _table(rows: Sequence[tuple[str, ...]], columns: int) -> list[str]:
    """Lines of a table; where these are too long, model and sampling of a row are a line below it.

    Args:
        rows: The header and the rows.
        columns: Width of the terminal.
    """
    lines = _aligned(rows, left=4)
    if max(map(len, lines)) <= columns:
        return lines
    lines = _aligned([(row[0], *row[2:3], *row[4:]) for row in rows], left=2)
    details = ["", *(f"  {model}: {sampling}" for _, model, _, sampling, *_ in rows[1:])]
    return [line for pair in zip(lines, details, strict=True) for line in pair if line]


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Lines of a table whose first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _facts(catalog: Catalog) -> Iterator[dict[str, Any]]:
    """One mapping per provenance: who generated the responses, how many, and their size."""
    for key in chosen_keys(catalog):
        shards = [catalog.shards[number] for number in catalog.shard_indices(key)]
        counts = {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "cut", "bytes")}
        generators = sorted({shard.generator for shard in shards if shard.generator})
        responses = sum(shard.responses for shard in shards)
        yield catalog.provenances[key] | {
            "key": key,
            "generators": generators,
            "responses": responses,
            "held_out": sum(shard.responses for shard in shards if shard.purpose == "reference"),
            **counts,
            "shards": len(shards),
        }


def _cells(fact: dict[str, Any]) -> tuple[str, ...]:
    settings = fact["sampling"]
    sampling = (
        "greedy" if settings["temperature"] == 0 else f"T {settings['temperature']:g}, top-p {settings['top_p']:g}"
    )
    sampling += f", top-k {settings['top_k']}" if settings["top_k"] else ""
    sampling += f", {settings['max_new_tokens']} tokens, seed {settings['seed']}"
    counts = (str(fact[name]) for name in ("responses", "tokens", "cut", "shards"))
    model = fact["model"] if len(fact["model"]) <= 12 else f"{fact['model'][:11]}…"
    return (fact["writer"], model, str(fact["round"]), sampling, *counts, _size(fact["bytes"]))


def _size(count: float) -> str:
    """A number of bytes with a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _show(arguments: argparse.Namespace) -> list[str]:
    if arguments.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {arguments.limit}.")
    catalog = open_store(arguments.path)
    rows = stored_rows(catalog, chosen_keys(catalog, arguments.writer, arguments.round))
    matches = (row for row in rows if row["prompt_id"].startswith(arguments.prompt or ""))
    lines: list[str] = []
    for row in islice(matches, arguments.limit):
        lines += [*_render(row), ""]
    return lines[:-1] or ["no matching response"]


def _render(row: dict[str, Any]) -> list[str]:
    """Lines that show a response below its prompt."""
    ended = "ended" if row["finish"] == "stop" else f"cut at {row['sampling']['max_new_tokens']}"
    head = f"{row['writer']}, round {row['round']}, prompt {row['prompt_id']}, {len(row['token_ids'])} tokens, {ended}"
    head += ", held out" if row["purpose"] == "reference" else ""
    prompt = [f"[{message['role']}] {message['content']}" for message in row["messages"] or ()]
    return [f"── {head}", *(readable(text) for text in (*prompt, f"[{row['writer']}] {row['text']}"))]


def _merge(arguments: argparse.Namespace) -> Sequence[str]:
    from distillkit.storage.merge import merge

    return merge(arguments.target, arguments.sources)


def _export(arguments: argparse.Namespace) -> Sequence[str]:
    from distillkit.storage.export import export

    return export(
        arguments.path,
        arguments.out,
        arguments.format,
        arguments.writer,
        arguments.round,
        arguments.ended,
        arguments.tokens,
        arguments.held_out,
    )


def _verify(arguments: argparse.Namespace) -> Sequence[str]:
    from distillkit.storage.verify import verify

    whole: Counter[str] = Counter()
    num_damaged = 0
    for state in verify(arguments.path):
        if state.problem:
            print(state.problem)
        elif not state.is_listed:
            print(f"{state.file} is in no manifest, so nothing reads it: a killed process may have left it")
        elif arguments.all:
            print(f"{state.file} is whole")
        num_damaged += bool(state.problem)
        whole[state.kind] += state.is_listed and not state.problem
    counts = [f"{count} whole files of {kind}" for kind, count in sorted(whole.items()) if count]
    if num_damaged:
        raise StoreError("; ".join([f"{num_damaged} files in {arguments.path} are damaged", *counts]) + ".")
    if not counts:
        raise StoreError(f"{arguments.path} has no store, teacher cache or checkpoint. Correct the path.")
    return [f"{arguments.path}: {', '.join(counts)}"]
