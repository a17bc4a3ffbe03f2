"""The documentation's pages and their fenced blocks."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELL = ("bash", "sh", "console")
LANGUAGES = (*SHELL, "python", "yaml", "toml", "jsonl")

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*(.*)$")
_FILE = re.compile(r"^# ([\w./-]+\.\w+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with its first line's number."""

    page: str
    line: int
    language: str
    text: str

    @property
    def location(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line is a comment that names one: `# pair.yaml`."""
        match = _FILE.match(self.text.partition("\n")[0])
        return match[1] if match else None

    def commands(self) -> list[str]:
        """The command lines of a shell block, continued lines joined; of a console those behind a prompt."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip() and not line.startswith("#")]


def pages() -> list[str]:
    """All pages whose commands and snippets are run."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        AssertionError: If a block does not end, or its language is none that the tests know what to do with.
    """
    result: list[Block] = []
    fence, language, start, inside = "", "", 0, []
    lines = ((ROOT / page).read_text() if text is None else text).splitlines()
    for number, line in enumerate(lines, start=1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, start, inside = match[1], match[2].partition(" ")[0], number + 1, []
            assert language in LANGUAGES, f"{page}:{number}: a block in {language or 'nothing'} would not be checked"
        elif fence and match and match[1].startswith(fence) and not match[2]:
            result.append(Block(page, start, language, "\n".join(inside) + "\n"))
            fence = ""
        elif fence:
            inside.append(line)
    assert not fence, f"{page}:{start}: the block does not end"
    return result


def all_blocks(languages: Iterable[str] = LANGUAGES) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in pages() for block in blocks(page) if block.language in languages]


def files() -> dict[str, str]:
    """Every file that a block of some page is."""
    result: dict[str, str] = {}
    for block in all_blocks():
        if block.file is not None:
            assert block.file not in result, f"{block.location}: {block.file} is on two pages"
            result[block.file] = block.text
    return result
