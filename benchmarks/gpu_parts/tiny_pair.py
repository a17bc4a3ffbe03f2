"""A tiny model on disk, for the parts that otherwise need a real one."""

from pathlib import Path

from distillkit.testing import tiny_model, tiny_tokenizer


def save_tiny_pair(folder: Path) -> str:
    """Saves a random model of three layers, of which a student may have fewer; its folder."""
    if not (folder / "config.json").exists():
        tokenizer = tiny_tokenizer()
        tiny_model(len(tokenizer), layers=3, seed=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder.resolve())
