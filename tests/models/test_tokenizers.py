import json

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from distillkit.errors import ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.models.checkpoint import read_tokenizer
from distillkit.models.tokenizers import eos_ids, fingerprint, load_tokenizer, require_same, vocab_size
from distillkit.types import Prompt, Prompts, Sampling
from helpers.models import (
    CHAT_TEMPLATE,
    END,
    END_ID,
    GAPPED_END_ID,
    START_ID,
    gapped_tokenizer,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)


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


def test_a_broken_generation_config_is_refused_instead_of_left_out(tmp_path):
    save_tiny(tmp_path, eos_token_id=[END_ID, 7])
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation config can't be loaded.*generation_config\.json' is not a valid"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("ends", ["1", [END_ID, "7"], [True]])
def test_an_end_token_that_is_no_id_is_refused(ends, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ModelError, match=r"generation config has the end token .*: set its eos_token_id to a token id"):
        load_tokenizer(str(tmp_path))


def test_an_end_token_after_a_gap_in_the_ids_is_generated():
    parts = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    parts["added_tokens"].append(parts["added_tokens"][0] | {"id": 400, "content": "<|end|>"})
    parts["model"]["vocab"]["<|end|>"] = 400
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|end|>")
    assert tokenizer.eos_token_id == 400 > len(tokenizer)
    assert vocab_size(tokenizer) == 401
    model = tiny_model(448, eos_token_id=400, tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.zeros(448).index_fill(0, torch.tensor(400), 1e6))
    generator = TransformersGenerator(progress=False)
    generator.refresh(model, tokenizer)
    prompts = Prompts((Prompt("p", (), (5, 6, 7)),))
    assert generator.generate(prompts, Sampling(temperature=0.0, max_new_tokens=4))[0].token_ids == (400,)


def name_class(folder, name):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_class_that_reads_the_file_in_another_way_is_not_used(tmp_path, caplog):
    name_class(save_tiny(tmp_path), "LlamaTokenizerFast")  # as DeepSeek's distilled Llamas: every space would be lost
    text = "Two words, and\n\n  more."
    loaded, expected = load_tokenizer(str(tmp_path)), tiny_tokenizer()(text)["input_ids"]
    assert loaded(text)["input_ids"] == expected
    assert loaded.decode(expected) == text
    assert (loaded.eos_token_id, loaded.chat_template) == (END_ID, CHAT_TEMPLATE)
    assert "does not tokenise text as tokenizer.json says, which is used instead" in caplog.text


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_class_that_agrees_with_the_file_is_used(name, tmp_path, caplog):
    name_class(save_tiny(tmp_path), name)
    assert type(read_tokenizer(str(tmp_path), "m")).__name__ == name
    assert not caplog.records


def test_text_has_the_same_tokens_each_time_although_the_file_asks_for_dropout(tmp_path):
    save_tiny(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = load_tokenizer(str(tmp_path))
    text = "What is the capital of France?"
    assert all(tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"] for _ in range(8))


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
    assert (len(gapped), gapped.eos_token_id, vocab_size(gapped)) == (320, GAPPED_END_ID, GAPPED_END_ID + 1)
    gapped.add_tokens(["<extra>"])
    assert vocab_size(gapped) == max(gapped.get_vocab().values()) + 1
    assert vocab_size(tiny_tokenizer()) == len(tiny_tokenizer())
