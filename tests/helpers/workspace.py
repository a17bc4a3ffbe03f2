"""The folder in which the documentation's commands and snippets run, made of tiny models and short files.

`python -m helpers.workspace FOLDER`, with `tests` in `PYTHONPATH`, makes one.
"""

import json
import sys
from pathlib import Path

from helpers import docs
from helpers.models import save_tiny

NUM_PROMPTS = {"prompts.jsonl": 6, "heldout.jsonl": 2}


def make(folder: Path) -> Path:
    """Writes the models and files that the documentation names, and those that it shows, into a new folder.

    Returns:
        The folder, with `teacher`, `student`, `prompts.jsonl`, `heldout.jsonl`, `preference.jsonl`, `configs`, and each
        file whose content is a block of some page.
    """
    folder.mkdir(parents=True)
    save_tiny(folder / "teacher", layers=4, seed=1)
    save_tiny(folder / "student", layers=2, seed=2)
    for name, count in NUM_PROMPTS.items():
        rows = [{"prompt": f"Name day {day} of the {name}.", "response": f"It is day {day}."} for day in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"Name day {day}.", "chosen": f"It is day {day}.", "rejected": "No."} for day in range(6)]
    (folder / "preference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, text in docs.files().items():
        (folder / name).write_text(text)
    (folder / "configs").symlink_to(docs.ROOT / "configs")
    return folder


def branch(folder: Path, new: Path) -> Path:
    """A new folder with the same content as one that `make` made, by links, for what one page writes."""
    new.mkdir(parents=True)
    for path in folder.iterdir():
        (new / path.name).symlink_to(path)
    return new


if __name__ == "__main__":
    make(Path(sys.argv[1]))
