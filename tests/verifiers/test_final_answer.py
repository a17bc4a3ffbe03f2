import pytest

from distillkit.verifiers.final_answer import final_answer

ANSWERS = {
    "It is 7.": "It is 7.",
    "<think>7?</think>It is 8.": "It is 8.",
    "<think>\n7?\n</think>\n\n8": "\n\n8",
    "7?</think>8": "8",
    "<think>7?": "",
    "Well. <think>7?": "Well. ",
    "<think>1</think>2<think>3</think>4": "24",
    "<thinking>7?</thinking>8": "8",
    "I think </thinks> 7": "I think </thinks> 7",
    "": "",
}


@pytest.mark.parametrize("text", ANSWERS)
def test_the_answer_is_what_follows_the_reasoning(text):
    assert final_answer(text) == ANSWERS[text]
