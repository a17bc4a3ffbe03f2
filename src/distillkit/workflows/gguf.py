"""Conversion of an exported student to a GGUF file, by the converter of llama.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

from distillkit.errors import ConfigError, ModelError, one_line

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
"""Types of the weights that the converter offers; `auto` is the folder's if it has 16 bits."""


def find_converter() -> str:
    """The path of llama.cpp's converter.

    Raises:
        ConfigError: If it is not installed.
    """
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise ConfigError(
            f"--gguf needs llama.cpp's {CONVERTER}, which is not on the PATH. Install llama.cpp (`brew install "
            "llama.cpp`, or clone github.com/ggml-org/llama.cpp and add its folder to the PATH), or leave --gguf out."
        )
    return converter


def convert(folder: Path, weights: str = "auto") -> Path:
    """Writes a GGUF file beside the files of an exported student.

    Args:
        folder: The folder of a merged student.
        weights: Type of the weights, one of `TYPES`.

    Returns:
        The file, which appears only once it is complete.

    Raises:
        ConfigError: If the converter is not installed.
        ModelError: If it fails.
    """
    suffix = "" if weights == "auto" else f"-{weights}"
    file, temporary = folder / f"{folder.resolve().name}{suffix}.gguf", folder / ".unfinished.gguf"
    command = [find_converter(), str(folder), "--outfile", str(temporary), "--outtype", weights]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not temporary.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise ModelError(
                f"{CONVERTER} can't convert {folder}, which is complete without a GGUF file. It says: "
                f"{one_line(lines[-1], 300)}"
            )
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file
