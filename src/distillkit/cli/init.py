"""The verb `init`: writes a small folder that runs as it is."""

import argparse
import os
from pathlib import Path


def run(argv: list[str]) -> int:
    """Runs `distillkit init`.

    Args:
        argv: The arguments after `distillkit init`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If the folder contains files, or there is no such method.
    """
    arguments = _parser().parse_args(argv)
    from distillkit.workflows.starter import CONFIG, write_starter  # takes seconds, which --help need not wait for

    pair = write_starter(arguments.folder, arguments.tiny, arguments.method)
    folder = Path(arguments.folder)
    print(f"{folder.resolve().name} is ready: {CONFIG} says what to change, README.md what each file is. Next:\n")
    if folder.resolve() != Path.cwd():
        print(f"  cd {os.path.relpath(folder)}")
    print(f"  distillkit fit --config {CONFIG}    # {pair.minutes}")
    print(f"  distillkit export runs/{folder.resolve().name} --to out")
    print("  distillkit chat out")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit init",
        description="Writes a folder that runs as it is: run.yaml with comments, prompts, and a README.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="a new folder, by default this one")
    parser.add_argument(
        "--tiny", action="store_true", help="with two tiny random models in the folder: runs in seconds, offline"
    )
    parser.add_argument("--method", default="distillm2", metavar="M", help="a method that `distillkit methods` lists")
    return parser
