"""The part of a response that answers, without the reasoning before it."""

import re

_REASONING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_END = re.compile(r"</think(?:ing)?>")


def final_answer(text: str) -> str:
    """Returns a response without its reasoning, the `<think>…</think>` blocks of reasoning models.

    Some chat templates write `<think>` into the prompt, so everything before a lone `</think>` is reasoning too. A
    response that was cut within its reasoning has no answer: the result is empty.
    """
    rest = _REASONING.sub("", text)
    return _END.split(rest)[-1]
