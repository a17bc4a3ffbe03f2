"""The verb `export`: writes the student of a run or a checkpoint as a folder that transformers loads."""

import argparse
from pathlib import Path

from distillkit.errors import ConfigError


def run(argv: list[str]) -> int:
    """Runs `distillkit export`.

    Args:
        argv: The arguments after `distillkit export`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If there is no such run or checkpoint, the folder contains files, or an option can't be followed.
        ModelError: If the checkpoint is damaged or of another kind, or the student can't be loaded.
        ServerError: If the hub refuses the upload.
    """
    arguments = _parser().parse_args(argv)
    # These take seconds, which --help need not wait for.
    from distillkit.workflows import gguf, hub
    from distillkit.workflows.checkpoints import choose_checkpoint
    from distillkit.workflows.student_export import export, require_new

    folder, repository = Path(arguments.to), arguments.push_to_hub
    require_new(folder)
    if arguments.gguf:
        if arguments.adapter_only:
            raise ConfigError("--gguf is written from a merged model: leave out --adapter-only.")
        gguf.find_converter()
    if repository:
        hub.check_upload(repository)
    checkpoint, reason = choose_checkpoint(arguments.source, arguments.which)
    name = repository or (folder.name if folder.is_absolute() else str(folder))  # a card names no local path
    export(checkpoint, folder, dtype=arguments.dtype, adapter_only=arguments.adapter_only, name=name)
    kind = "adapter" if arguments.adapter_only else "student"
    print(f"The {kind} of {checkpoint} ({reason}) is in {folder}.")
    if arguments.gguf:
        print(f"As GGUF: {gguf.convert(folder, arguments.gguf)}")
    if repository:
        print(f"On the hub: {hub.upload(folder, repository, not arguments.public)}")
    print(f"Talk to it with: distillkit chat {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit export",
        description="Writes the student of a run as a folder that transformers and vLLM load: safetensors, tokenizer, "
        "chat template, generation config and a model card. Needs neither the teacher nor the data.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="a run's folder, such as runs/x, or a .ckpt file")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--which",
        choices=("best", "last"),
        help="the run's checkpoint: best by the metric that a callback of it monitors, or the newest that is whole; by "
        "default the best where the run monitors one",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights; by default that of the model which the student began as",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--merge", action="store_true", help="merge a LoRA adapter into the model (the default)")
    parts.add_argument("--adapter-only", action="store_true", help="write the LoRA adapter alone")
    parser.add_argument(
        "--gguf",
        nargs="?",
        const="auto",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
        metavar="TYPE",
        help="also write a .gguf file (auto, f32, f16, bf16 or q8_0) with llama.cpp's convert_hf_to_gguf.py, if it is "
        "on the PATH",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload it as USER/NAME, private by default")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: make a new repository public")
    return parser
