import time
from fractions import Fraction

import pytest

from distillkit.errors import DataError
from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.numeric import NumericAnswer, answer, last_number

MARKED = {
    "Add 40 and 2.\n#### 42": 42,
    "####42": 42,
    "#### 42 dollars": 42,
    "#### $18.50": Fraction(37, 2),
    "#### -1,200": -1200,
    "#### **7**.": 7,
    "#### 50%": 50,
    "#### 7\nNo:\n#### 8": 8,
    "#### 42\nThat is 3 more than 39.": 42,
    "#### 42\n\\boxed{41}": 42,
    # Headings of the fourth level are no answers.
    "#### Step 1\nIt is 12.": 12,
    "#### 1. Setup\nThe answer is 9": 9,
    "#### 2 apples and 3 pears\nso 5": 5,
    "##### 3\nso 4": 4,
    "####\n5": 5,
}
BOXED = {
    r"\boxed{42}": 42,
    r"So $\boxed{5}$ and not 7": 5,
    r"\boxed{3} then \boxed{4}": 4,
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    r"\boxed{-\dfrac{3}{4}}": Fraction(-3, 4),
    r"\boxed{x = 5}": 5,
    r"\boxed{\text{about } 5 \text{ km}}": 5,
    r"\boxed{1{,}234}": 1234,
    r"\boxed{12\,345}": 12345,
    r"\boxed{\$5}": 5,
    r"\boxed{}, which is 4": 4,
    r"\boxed{4": 4,
    r"\boxed {4}, not 5": 4,
    r"\boxed{(4)}": 4,
    r"\boxed{3\frac{1}{2}}": Fraction(7, 2),
    r"\boxed{-3 \frac12}": Fraction(-7, 2),
    r"\boxed{3 1/2}": Fraction(7, 2),
    r"\boxed{5 \times 10^{3}}": 5000,
    r"\boxed{1.5 \cdot 10^{-3}}": Fraction(3, 2000),
    r"\boxed{12\text{ cm}^2}": 12,
    r"\boxed{12\,\mathrm{m}^{-1}}": 12,
    r"\boxed{90^\circ}": 90,
    r"\boxed{90^{\circ}}": 90,
    r"\boxed{25\%}": 25,
    r"\boxed{5 apples}": 5,
    r"\boxed{\text{5 km}}": 5,
    r"\boxed{\textbf{(C)}\ 7}": 7,
    r"\boxed{f(x) = 7}": 7,
    r"\boxed{x \approx 5.2}": Fraction(26, 5),
    r"\boxed{-\frac{1}{2}}": Fraction(-1, 2),
    r"\boxed{\frac{-1}{2}}": Fraction(-1, 2),
    r"\boxed{12\ 345}": 12345,
}
NO_NUMBER = [
    r"\boxed{2\sqrt{3}}",
    r"It is 3: \boxed{\sqrt{3}}",
    r"\boxed{2\sqrt{3",
    r"\boxed{\frac{\sqrt{3}}{2}}",
    r"\boxed{\frac{x}{3}}",
    r"\boxed{(5, 7)}",
    r"\boxed{\left(5, 7\right)}",
    r"\boxed{[0, 1)}",
    r"\boxed{\{1, 2\}}",
    r"\boxed{1, 2}",
    r"\boxed{1,2}",
    r"\boxed{5x}",
    r"\boxed{5 x}",
    r"\boxed{3\pi}",
    r"\boxed{3 + 4}",
    r"\boxed{3 + 4i}",
    r"\boxed{2^{10}}",
    r"\boxed{10^3}",
    r"\boxed{101_2}",
    r"\boxed{7!}",
    r"\boxed{\pm 5}",
    r"\boxed{3:4}",
    r"\boxed{0.\overline{3}}",
    r"\boxed{x = 5, y = 7}",
    r"\boxed{x = 5 \text{ or } x = 7}",
    r"\boxed{5 \text{ or } 7}",
    r"\boxed{2\mathrm{i}}",
    r"\boxed{x > 5}",
    r"\boxed{1.2.3}",
    r"\boxed{7/2/3}",
    r"\boxed{3 7/2}",
    # Without a box, the last number is a part of something else.
    r"So it is 2\sqrt{3}.",
    "So it is 2√3.",
    "It is (5, 7).",
    "It is (x = 5, y = 7).",
    "It is 1.2.3",
    "On 1/2/2023",
    "It is 10^{-3}",
    "It is 2^10.",
    "It is 101_2",
    "It is 3π",
    "1,2,3",
    "3 × 4",
    r"\frac{\sqrt{2}}{2}",
    "1e999999999",
    "9" * 3000,
    "1/" + "9" * 3000,
    "<think>It must be 7.",
]
LAST = {
    "The answer is 42.": 42,
    "3 + 4 = 7": 7,
    "It costs $1,200.50 in all": Fraction(2401, 2),
    "1,234,567 people": 1234567,
    "1, 2, 3": 3,
    "-5": -5,
    "x=-5": -5,
    "x = - 5": -5,
    "−5": -5,
    "-$5": -5,
    "$-5": -5,
    "+5": 5,
    "10-3": 3,
    "3 - 5": 5,
    "x - 5": 5,
    "5–7": 7,
    "a-5": 5,
    ".5": Fraction(1, 2),
    "0.50": Fraction(1, 2),
    "1/2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    r"\frac{10}{4}": Fraction(5, 2),
    r"\(-\tfrac12\) or \frac{ 1 }{ 2 }": Fraction(1, 2),
    "50%": 50,
    "1e3": 1000,
    "1.5e-3": Fraction(3, 2000),
    "20km": 20,
    "**42**": 42,
    "(42)": 42,
    "3.14.": Fraction(157, 50),
    "7,": 7,
    "1,000.": 1000,
    "0": 0,
    "٣": 3,
    "007": 7,
    "1e400": 10**400,
    "3 1/2": Fraction(7, 2),
    "-3 1/2 cups": Fraction(-7, 2),
    "3½": Fraction(7, 2),
    "¾": Fraction(3, 4),
    "3⁄4": Fraction(3, 4),
    "－5": -5,
    "１２": 12,
    "1\u202f234\u202f567 people": 1234567,
    "٣٫٥": Fraction(7, 2),
    "about 1.5 × 10^3 metres": 1500,
    "1.5 * 10^{-3}": Fraction(3, 2000),
    "(see pages 3, 7)": 7,
    '{"answer": 5}': 5,
    r"$\textbf{42}$": 42,
    r"2\sqrt{3} \approx 3.46": Fraction(173, 50),
    "<think>Is it 7? Or \\boxed{8}?</think>It is 9.": 9,
    "It may be 7.</think>\nIt is 9.": 9,
}


@pytest.mark.parametrize(("text", "expected"), [*MARKED.items(), *BOXED.items(), *LAST.items()])
def test_the_answer_of_a_text(text, expected):
    assert answer(text) == expected


@pytest.mark.parametrize("text", ["", "none", "H2O", "5/0", "x_1", "forty-two", "#### none", r"\boxed{x}", "####"])
def test_a_text_without_a_number_has_no_answer(text):
    assert answer(text) is None


@pytest.mark.parametrize("text", NO_NUMBER)
def test_an_answer_that_is_more_than_a_number_has_no_numeric_value(text):
    assert answer(text) is None


def test_a_marked_answer_does_not_hide_behind_the_last_number():
    text = "#### 42\n(page 3)"
    assert (answer(text), last_number(text)) == (42, 3)


LONG = 20_000
WILD = [
    "9" * LONG,
    "1" + ",111" * LONG + ",1",
    "1," * LONG,
    "1 " * LONG + "1/",
    "1." * LONG,
    "1/" * LONG,
    "(" * LONG + "1",
    "(1," * LONG + "1)",
    "-" * LONG,
    "- " * LONG + "1",
    " " * LONG + "5" + " " * LONG + ")",
    "#### a" + " " * LONG + "b",
    "#### 5" + " " * LONG + "b c",
    "####" * LONG,
    r"\boxed{" * LONG,
    r"\boxed{5" + " " * LONG + "!}",
    r"\boxed{" + "5 ab" * LONG + "}",
    r"\boxed{" + "(" * LONG + "5" + ")" * LONG + "}",
    r"\frac{" * LONG,
    r"\text{" * LONG + "5",
    r"\text{a}" * LONG + "5",
    "=" * LONG + "5",
    "<think>" * LONG + "5",
    "</think>" * LONG + "5",
    "{" * LONG + "5}",
]


@pytest.mark.parametrize("text", WILD, ids=lambda text: text[:12])
def test_a_wild_text_takes_linear_time(text):
    start = time.process_time()
    answer(text)
    assert time.process_time() - start < 1  # a search in quadratic time takes minutes


def asked(*references):
    messages = ({"role": "user", "content": "How many?"},)
    return Prompts(tuple(Prompt(str(n), messages, (5,), reference=text) for n, text in enumerate(references)))


def test_a_response_with_the_references_number_is_right():
    prompts = asked("40 + 2 = 42\n#### 42", "It is one half.\n#### 0.5", "#### 3", "#### 4")
    texts = ["That makes 42.0 apples.", r"\boxed{\frac{1}{2}}", "It is 4.", "I don't know."]
    responses = [Response(str(n), (5,), text, "stop") for n, text in enumerate(texts)]
    assert NumericAnswer().verify(prompts, responses) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reference", "message"), [(None, "has no response"), ("Many.", "has a response without a numeric answer")]
)
def test_a_prompt_without_a_number_to_compare_with_is_refused(reference, message):
    assert NumericAnswer().needs_reference
    for ask in (NumericAnswer().check, lambda prompts: NumericAnswer().verify(prompts, [])):
        with pytest.raises(DataError, match=rf"prompt 'How many\?' {message}: correct the data"):
            ask(asked("#### 1", reference))
