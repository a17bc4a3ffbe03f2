"""`distillkit store info | show | merge | export`: looks into response stores; imports neither torch nor lightning."""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distillkit.cli.store_rows import chosen_keys, open_store, stored_rows
from distillkit.errors import ConfigError
from distillkit.store_index import PROMPTS, Catalog

HEADER = ("WRITER", "MODEL", "ROUND", "SAMPLING", "RESPONSES", "TOKENS", "CUT", "SHARDS", "SIZE")


def run(argv: list[str]) -> int:
    """Does what the arguments after `distillkit store` say.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If an argument is wrong.
        StoreError: If a store is missing or damaged, or two can't be one.
    """
    arguments = _parser().parse_args(argv)
    print("\n".join(arguments.function(arguments)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit store", description="Looks into response stores.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str, function: Any, *places: tuple[str, str]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        for place, what in places:
            added.add_argument(place, metavar=place.upper(), help=what)
        added.set_defaults(function=function)
        return added

    path = ("path", "the store: a folder, or another address of fsspec's, such as s3://…")
    info = verb("info", "say who wrote how much", _info, path)
    info.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")
    show = verb("show", "print some responses with their prompts", _show, path)
    show.add_argument("--prompt", help="only those to prompts whose id begins so")
    show.add_argument("--limit", type=int, default=5, help="how many at most (5)")
    merge = verb("merge", "add what several stores hold to one", _merge, ("target", "the store that is added to"))
    merge.add_argument("sources", metavar="SOURCE", nargs="+", help="a store that is read")
    export = verb("export", "write responses as conversations to train on", _export, path)
    export.add_argument("out", metavar="OUT", type=Path, help="a new file, .jsonl or .jsonl.gz, or a new folder")
    export.add_argument(
        "--format", choices=("jsonl", "datasets"), default="jsonl", help="datasets: a folder for the hub"
    )
    export.add_argument("--ended", action="store_true", help="leave out those that were cut")
    export.add_argument("--tokens", action="store_true", help="with token ids and the writer's log-probabilities")
    for chooser in (show, export):
        chooser.add_argument("--writer", help="only those of one writer, such as teacher")
        chooser.add_argument("--round", type=int, help="only those of one round")
    return parser


def _info(arguments: argparse.Namespace) -> list[str]:
    catalog = open_store(arguments.path)
    facts = list(_facts(catalog))
    prompts = len(catalog.index(PROMPTS))
    if arguments.json:
        return [json.dumps({"provenances": facts, "prompts": prompts}, indent=2, ensure_ascii=False)]
    rows = [HEADER, *(_cells(fact) for fact in facts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    responses, size = (sum(fact[name] for fact in facts) for name in ("responses", "bytes"))
    return [*lines, f"{responses} responses, {_size(size)}; the messages of {prompts} prompts"]


def _facts(catalog: Catalog) -> Iterator[dict[str, Any]]:
    """What is to be said of each provenance."""
    for key in chosen_keys(catalog):
        shards = [catalog.shards[number] for number in catalog.of_key(key)]
        counts = {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "cut", "bytes")}
        generators = sorted({shard.generator for shard in shards if shard.generator})
        responses = sum(shard.responses for shard in shards)
        yield catalog.provenances[key] | {
            "key": key, "generators": generators, "responses": responses, **counts, "shards": len(shards)
        }  # fmt: skip


def _cells(fact: dict[str, Any]) -> tuple[str, ...]:
    drawn = fact["sampling"]
    how = "greedy" if drawn["temperature"] == 0 else f"T {drawn['temperature']:g}, top-p {drawn['top_p']:g}"
    how += f", top-k {drawn['top_k']}" if drawn["top_k"] else ""
    how += f", {drawn['max_new_tokens']} tokens, seed {drawn['seed']}"
    counts = (str(fact[name]) for name in ("responses", "tokens", "cut", "shards"))
    model = fact["model"] if len(fact["model"]) <= 12 else f"{fact['model'][:11]}…"
    return (fact["writer"], model, str(fact["round"]), how, *counts, _size(fact["bytes"]))


def _size(count: float) -> str:
    """Bytes, readable."""
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
    wanted = (row for row in rows if row["prompt_id"].startswith(arguments.prompt or ""))
    lines: list[str] = []
    for row in islice(wanted, arguments.limit):
        lines += [*_shown(row), ""]
    return lines[:-1] or ["no such response"]


def _shown(row: dict[str, Any]) -> list[str]:
    ended = "ended" if row["finish"] == "stop" else f"cut at {row['sampling']['max_new_tokens']}"
    head = f"{row['writer']}, round {row['round']}, prompt {row['prompt_id']}, {len(row['token_ids'])} tokens, {ended}"
    asked = [f"[{one['role']}] {one['content']}" for one in row["messages"] or ()]
    return [f"── {head}", *asked, f"[{row['writer']}] {row['text']}"]


def _merge(arguments: argparse.Namespace) -> Sequence[str]:
    from distillkit.cli.store_merge import merge

    return merge(arguments.target, arguments.sources)


def _export(arguments: argparse.Namespace) -> Sequence[str]:
    from distillkit.cli.store_export import export

    return export(
        arguments.path, arguments.out, arguments.format,
        arguments.writer, arguments.round, arguments.ended, arguments.tokens,
    )  # fmt: skip
