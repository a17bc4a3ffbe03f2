import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distillkit.errors import ModelError
from distillkit.models.tokenizers import eos_ids, fingerprint, load_tokenizer, num_ids, require_same
from helpers.models import END, END_ID, GAPPED_END_ID, START_ID, gapped_tokenizer, save_tiny, tiny_model, tiny_tokenizer


def renamed(tokenizer, old, new):
    """The same tokenizer, but with another string for one token, which no merge may name."""
    text = tokenizer.backend_tokenizer.to_str().replace(f'"{old}"', f'"{new}"')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=END)


def test_a_saved_tokenizer_comes_back(tmp_path):
    tokenizer, expected = load_tokenizer(str(save_tiny(tmp_path))), tiny_tokenizer()
    messages = [{"role": "user", "content": "What is the sea? ü €"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhat is the sea? ü €<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"][0] == START_ID


def test_without_a_pad_token_the_end_token_pads(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save_tiny(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == END_ID


def test_without_an_end_token_it_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    save_tiny(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no end token"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path}: .*tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_equal_tokenizers_pass():
    require_same(tiny_tokenizer(), tiny_tokenizer(), "small", "large")


def test_the_first_differing_token_is_named():
    other = renamed(tiny_tokenizer(), "~", "ÿÿ")
    number = tiny_tokenizer().get_vocab()["~"]
    said = (
        rf"The tokenizers of the s and the t differ: id {number} is '~' for the s and 'ÿÿ' for the t.*cross-tokenizer"
    )
    with pytest.raises(ModelError, match=said):
        require_same(tiny_tokenizer(), other, "the s", "the t")
    with pytest.raises(ModelError, match="differ"):  # not an added token
        require_same(tiny_tokenizer(), other, "the s", "the t", "unused")


def test_a_longer_vocabulary_is_another_tokenizer():
    with pytest.raises(ModelError, match=r"id 320 is no token for s and '.*' for t"):
        require_same(tiny_tokenizer(320), tiny_tokenizer(330), "s", "t")


def test_end_ids_are_those_of_tokenizer_and_generation_config(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 5]
    assert eos_ids(tiny_tokenizer(), model) == (END_ID, 5, 7)
    model.save_pretrained(tmp_path)
    assert eos_ids(tiny_tokenizer(), str(tmp_path)) == (END_ID, 5, 7)


def test_where_no_model_is_loaded_the_end_ids_of_a_source_are_those_of_its_generation_config_too(tmp_path):
    # The data and the generators that read a file or ask a server have the tokenizer alone.
    save_tiny(tmp_path, eos_token_id=[7, 5])
    assert eos_ids(load_tokenizer(str(tmp_path)), None) == (END_ID, 5, 7)


def test_without_a_generation_config_the_config_counts(tmp_path):
    save_tiny(tmp_path, eos_token_id=9)
    (tmp_path / "generation_config.json").unlink()
    assert eos_ids(tiny_tokenizer(), str(tmp_path)) == (END_ID, 9)


def test_no_end_id_at_all_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has an end token"):
        eos_ids(tokenizer, tiny_model(eos_token_id=None))


def test_a_fingerprint_names_the_vocabulary_and_the_chat_template(tmp_path):
    loaded, other = load_tokenizer(str(save_tiny(tmp_path))), tiny_tokenizer()
    assert fingerprint(loaded) == fingerprint(tiny_tokenizer())
    other.chat_template = "{{ messages }}"
    found = {fingerprint(one) for one in (loaded, other, tiny_tokenizer(330), renamed(tiny_tokenizer(), "~", "ÿÿ"))}
    assert len(found) == 4


def test_ids_are_counted_over_the_gaps_of_a_vocabulary():
    gapped = gapped_tokenizer()
    assert (len(gapped), gapped.eos_token_id, num_ids(gapped)) == (320, GAPPED_END_ID, GAPPED_END_ID + 1)
    gapped.add_tokens(["<extra>"])
    assert num_ids(gapped) == max(gapped.get_vocab().values()) + 1
    assert num_ids(tiny_tokenizer()) == len(tiny_tokenizer())
