"""The verb `export`: writes the student of a checkpoint as a folder that transformers loads."""

import argparse


def run(argv: list[str]) -> int:
    """Runs `distillkit export`.

    Args:
        argv: The arguments after `distillkit export`.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: If there is no such checkpoint, or the folder contains files.
        ModelError: If the checkpoint is damaged or of another kind, or the student can't be loaded.
    """
    arguments = _parser().parse_args(argv)
    from distillkit.workflows.student_export import export  # takes seconds, which --help need not wait for

    print(f"The student is in {export(arguments.checkpoint, arguments.out)}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit export",
        description="Writes the student of a checkpoint as a folder that transformers loads: safetensors (a LoRA "
        "adapter merged), tokenizer, chat template and generation config. Needs neither the teacher nor the data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="the checkpoint, such as runs/x/checkpoints/last.ckpt"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    return parser
