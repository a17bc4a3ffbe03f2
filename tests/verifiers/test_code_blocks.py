"""The Python code of a response, by the way in which models write it."""

import textwrap

import pytest

from distillkit.verifiers.code_blocks import Block, code_blocks

CODE = "def double(x):\n    return 2 * x"
FENCED = f"```python\n{CODE}\n```"
LISTED = textwrap.indent(FENCED, "   ")

RESPONSES = {
    "bare": CODE,
    "fenced": f"Here it is:\n\n{FENCED}\n\nIt doubles.",
    "without a word": f"```\n{CODE}\n```",
    "py": f"```py\n{CODE}\n```",
    "python3": f"```python3\n{CODE}\n```",
    "Python3.11": f"```Python3.11\n{CODE}\n```",
    "with a title": f'``` python title="double.py"\n{CODE}\n```',
    "in braces": f"```{{.python .numberLines}}\n{CODE}\n```",
    "tildes": f"~~~python\n{CODE}\n~~~",
    "four marks": f"````python\n{CODE}\n````",
    "CRLF": f"Here:\r\n{FENCED}\r\nDone.".replace("\n", "\r\n").replace("\r\r", "\r"),
    "old Mac": f"Here:\n{FENCED}\nDone.".replace("\n", "\r"),
    "in a list": f"1. First:\n\n{LISTED}\n\n2. Then",
    "in a list with tabs": "- Use:\n" + textwrap.indent(FENCED, "\t"),
    "a list whose code is not indented": f"1. Use:\n   ```python\n{CODE}\n   ```",
    "spaces after the fences": f"```python  \n{CODE}\n```   ",
    "bash before": f"```bash\npip install x\n```\n{FENCED}",
    "bash after": f"{FENCED}\n```bash\npython double.py\n```",
    "output after": f"{FENCED}\nOutput:\n```\n4\n```",
    "JSON before": f'```json\n{{"x": 2}}\n```\n{FENCED}',
    "reasoning": f"<think>\n```python\nraise ValueError\n```\n</think>\n{FENCED}",
    "reasoning without its start": f"```python\nraise ValueError\n```\n</think>\n{FENCED}",
    "a block that is no Python": f"```python\n>>> double(2)\n4\n```\n{FENCED}",
    "cut": f"Here:\n```python\n{CODE}",
    "opened by the prompt": f"{CODE}\n```\nIt doubles.",
    "backticks within": f"```python\n{CODE}  # `2 * x`\n```",
}


@pytest.mark.parametrize("kind", RESPONSES)
def test_the_code_of_a_response(kind):
    sources = [block.source for block in code_blocks(RESPONSES[kind])]
    namespace = {}
    exec("\n".join(sources), namespace)
    assert namespace["double"](2) == 4
    assert not any(block.is_example for block in code_blocks(RESPONSES[kind]))


def test_blocks_that_only_use_others_are_examples():
    text = f"```python\nimport math\nTWO = 2\n```\n{FENCED}\nFor example:\n```python\nprint(double(int(input())))\n```"
    assert code_blocks(text) == [Block("import math\nTWO = 2"), Block(CODE), Block("print(double(int(input())))", True)]
    assert code_blocks("```python\nprint(1)\n```\n```python\nx = 2\n```") == [Block("print(1)"), Block("x = 2")]


@pytest.mark.parametrize("text", ["```bash\nls\n```", "<think>\n" + FENCED, "```javascript\nlet x\n```\nas above"])
def test_a_response_without_python_has_no_code(text):
    assert [block.source for block in code_blocks(text) if block.source.strip()] == []


def test_an_indented_block_keeps_its_inner_indentation():
    (block,) = code_blocks("* A:\n\n    ```python\n    if x:\n        y\n\n    z\n    ```")
    assert block.source == "if x:\n    y\n\nz"


@pytest.mark.parametrize(
    "text", ["```" * 20_000, "```\n" * 20_000, "`" * 100_000, " " * 100_000 + "```", "```python\n" + "(" * 5000]
)
def test_a_wild_text_takes_no_time(text):
    code_blocks(text)
