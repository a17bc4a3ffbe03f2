import peft
import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from distillkit.data.collate import collate
from distillkit.errors import ModelError
from distillkit.models.heads import check_head, logits_width, output_head
from distillkit.models.scoring import score
from distillkit.types import Row
from helpers.batches import VOCAB
from helpers.families import made
from helpers.models import tiny_model


def llama(**config):
    return tiny_model(VOCAB, **config)


def with_head_bias():
    model = llama(tie_word_embeddings=False)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    model.lm_head.bias = nn.Parameter(bias)
    return model


def with_lora_on_the_head():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(llama(tie_word_embeddings=False), config).eval()


MODELS = {
    "llama": llama,
    "untied": lambda: llama(tie_word_embeddings=False),
    "bias": with_head_bias,
    "gemma2, soft cap": lambda: made(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
    "granite, logits_scaling": lambda: made(GraniteForCausalLM, GraniteConfig, logits_scaling=7.0),
    "cohere, logit_scale": lambda: made(CohereForCausalLM, CohereConfig, logit_scale=0.3),
    "lora on the head": with_lora_on_the_head,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def some_rows():
    """Rows of different lengths; one has two turns, one nothing to train on."""
    generator = torch.Generator().manual_seed(1)
    masks = ["0001111", "01", "00011001110", "0000", "00000000000000001"]
    return [
        Row(
            tuple(torch.randint(VOCAB, (len(mask),), generator=generator).tolist()),
            tuple(c == "1" for c in mask),
            "w",
            str(i),
        )
        for i, mask in enumerate(masks)
    ]


@torch.no_grad()
def by_transformers(model, rows, vocab=VOCAB):
    """`[N, vocab]` log-probabilities before each response token, of each row alone, and `[N]` the tokens."""
    found, targets = [], []
    for row in rows:
        logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
        for t, trained in enumerate(row.response_mask):
            if trained:
                found.append(logits[t - 1, :vocab].log_softmax(-1))
                targets.append(row.input_ids[t])
    return torch.stack(found), torch.tensor(targets)


@every_model
def test_scores_are_what_transformers_gives_one_position_earlier(make):
    model, rows = make(), some_rows()
    expected, targets = by_transformers(model, rows)
    batch = collate(rows, pad_id=1)
    with torch.no_grad():
        found = score(model, batch, VOCAB).log_probs()
    assert torch.equal(batch.targets, targets)
    # Padding changes the shapes of float32 products, and with them the rounding.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@every_model
@pytest.mark.parametrize("vocab", [1, 40])
def test_a_smaller_vocabulary_is_cut_before_the_softmax(make, vocab):
    model, rows = make(), some_rows()
    with torch.no_grad():
        found = score(model, collate(rows, pad_id=1), vocab)
        log_probs = found.log_probs()
    assert (found.vocab, log_probs.shape[1]) == (vocab, vocab)
    torch.testing.assert_close(log_probs, by_transformers(model, rows, vocab)[0], atol=2e-5, rtol=1e-5)


@every_model
def test_a_known_head_passes_its_check(make):
    check_head(make(), "student x")


def test_padding_and_prompts_never_reach_the_head():
    rows = some_rows()
    found = score(llama(), collate(rows, pad_id=1), VOCAB)
    assert found.hidden.shape == (sum(sum(row.response_mask) for row in rows), 32)


def test_a_batch_without_positions_still_has_a_graph():
    batch = collate([Row((3, 4), (False, False), "w", "a")], pad_id=1)
    model = llama()
    log_probs = score(model, batch, VOCAB).log_probs()
    assert log_probs.shape == (0, VOCAB)
    log_probs.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_the_gradient_is_that_of_the_whole_logits():
    rows, (model, other) = some_rows(), (llama(), llama())
    batch = collate(rows, pad_id=1)
    found = score(model, batch, VOCAB).log_probs().gather(-1, batch.targets[:, None])
    found.sum().backward()
    logits = other(batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    logp[batch.response_mask[:, 1:]].sum().backward()
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_the_adapter_on_the_head_is_among_its_parameters_and_gets_a_gradient():
    model = with_lora_on_the_head()
    head = output_head(model, VOCAB)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    score(model, collate(some_rows(), pad_id=1), 40).log_probs()[:, 0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


class Scaled(LlamaForCausalLM):
    """Scales its logits by a number that no setting tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_logits_that_are_not_the_heads_are_refused():
    model = llama()
    model.__class__ = Scaled
    with pytest.raises(
        ModelError, match=r"teacher y: the logits of Scaled are not its output head applied to its last hidden states"
    ):
        check_head(model, "teacher y")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("gemma2, soft cap", "final_logit_softcapping", None),
        ("granite, logits_scaling", "logits_scaling", 1.0),
        ("cohere, logit_scale", "logit_scale", None),
    ],
)
def test_a_head_that_overlooks_a_setting_is_refused(name, setting, value, monkeypatch):
    model = MODELS[name]()
    blind = type(model.config)(**model.config.to_dict() | {setting: value})
    monkeypatch.setattr(model.config, "get_text_config", lambda: blind)
    with pytest.raises(ModelError, match=r"they differ by \d"):
        check_head(model, "student x")


@pytest.mark.parametrize("training", [True, False])
def test_the_check_reads_the_model_without_dropout_and_leaves_its_mode(training):
    model = llama(attention_dropout=0.5).train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_head(model, "student x")
    assert [module.training for module in model.modules()] == modes


def test_the_width_counts_padding_of_the_vocabulary_and_looks_through_adapters():
    assert logits_width(llama()) == logits_width(with_lora_on_the_head()) == VOCAB


def test_a_model_without_an_output_embedding_is_refused():
    with pytest.raises(ModelError, match="LlamaModel has no output embedding: only causal language models"):
        logits_width(llama().model)
