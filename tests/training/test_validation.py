from distillkit.curators.single import DatasetCurator
from distillkit.data.chat import encode
from distillkit.evaluation.heldout import HeldOut
from distillkit.training.validation import Validation
from distillkit.types import Prompts, Record, Sampling
from helpers.models import END_ID, tiny_tokenizer

TURNS = (("user", "Two?"), ("assistant", "It is two."), ("user", "And four?"), ("assistant", "It is four."))


def test_the_reference_of_a_conversation_is_its_last_answer():
    tokenizer, heldout = tiny_tokenizer(), HeldOut()
    record = Record(tuple({"role": role, "content": text} for role, text in TURNS), "here")
    prompts = Prompts((encode(record, tokenizer, (END_ID,), chat=True),))
    rows = DatasetCurator().curate(prompts, {})
    assert sum(rows[0].response_mask) > 2 * len(tokenizer.encode("It is two."))  # both answers are trained on
    validation = Validation(heldout, Sampling())
    validation.set_references(prompts, rows, tokenizer)
    assert validation._references == ["It is four."]
