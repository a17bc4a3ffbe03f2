"""Verifier for numeric answers: extracts the answer from a text and compares it exactly with the reference's."""

import re
from collections.abc import Sequence
from fractions import Fraction

from distillkit.errors import DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response
from distillkit.verifiers.final_answer import final_answer
from distillkit.verifiers.numbers import last_number, line_number, only_number

_BOX = re.compile(r"\\boxed\s?\{")


class NumericAnswer(Verifier):
    r"""1 if a response has the same numeric answer as the reference response, else 0.

    The answer is the number after the last `####` line, as in GSM8K, or in the last `\boxed{…}`, or else the last
    number in the text. Numbers are compared exactly, as fractions: 0.5, 1/2, .50 and \frac{1}{2} are equal. A boxed
    answer that is more than a number, such as `2\sqrt{3}` or `(5, 7)`, has no numeric value and equals nothing.
    Reasoning in `<think>…</think>` is not part of a response.
    """

    needs_reference = True

    def check(self, prompts: Prompts) -> None:
        """Checks that every prompt has a reference response with a numeric answer.

        Raises:
            DataError: If a prompt has no reference response, or its answer is not a number.
        """
        for prompt in prompts:
            if prompt.reference is None or answer(prompt.reference) is None:
                problem = "has no response" if prompt.reference is None else "has a response without a numeric answer"
                raise DataError(
                    f"NumericAnswer compares with the number in the response in the data, and prompt "
                    f"{prompt.messages[-1]['content'][:60]!r} {problem}: correct the data or use another verifier."
                )

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0 or 1 for each response.

        Raises:
            DataError: If a prompt has no reference response, or it contains no number.
        """
        self.check(prompts)
        expected = [answer(prompt.reference or "") for prompt in prompts]
        return [float(answer(response.text) == number) for response, number in zip(responses, expected, strict=True)]


def answer(text: str) -> Fraction | None:
    r"""Returns the numeric answer in a text; None if the text has no number, or its boxed answer is not a number.

    Args:
        text: A response with its answer after `####`, in `\boxed{…}`, or as its last number.
    """
    text = final_answer(text)
    lines = (line.strip(" \t") for line in text.splitlines())
    # A Markdown heading of level four starts with #### too, but is not only a number.
    marked = [line_number(line.removeprefix("####")) for line in lines if line.startswith("####")]
    numbers = [number for number in marked if number is not None]
    if numbers:
        return numbers[-1]
    boxed = _last_boxed(text)
    return last_number(text) if boxed is None or not boxed.strip() else only_number(boxed)


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, or the rest of the text if it is not closed; None if there is none."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    begin = boxes[-1].end()
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return text[begin:]
