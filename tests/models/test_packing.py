"""Letters: L tokens of a line, N response positions, V vocabulary."""

import copy
import logging
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    masking_utils,
)

from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import DistiLLM2, ForwardKL
from distillkit.models import packing
from distillkit.models.scoring import packs, score
from distillkit.types import Prompt, Prompts, Sampling, Scores
from helpers.batches import BATCHES, SHARED, VOCAB, tokens
from helpers.families import MODELS, made
from helpers.models import tiny_model, tiny_tokenizer

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def padded(batch):
    return replace(batch, packed=None)


def largest(tensor):
    return max(float(tensor.abs().max()), 1e-30)


def assert_same(found, expected, tolerance):
    """Each tensor is off by at most `tolerance` of its largest entry."""
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() <= tolerance * largest(other)


def lengths_seen(model):
    """Shapes of what the model is given from now on."""
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


# Models: packed rows give what padded rows give.

# Rounding of float32 products of other shapes, measured: 9e-7 for states, 3e-6 for gradients. In float64: 5e-15.
SINGLE, DOUBLE = 1e-5, 1e-10


def in_float64(model):
    """The model in float64, also where its norms would compute in float32; None for norms that can't be told to."""
    for own in model.modules():
        name = type(own).__name__
        if name in ("LlamaRMSNorm", "Qwen2RMSNorm"):
            own.forward = partial(
                rms_norm, normalized_shape=own.weight.shape, weight=own.weight, eps=own.variance_epsilon
            )
        elif "RMSNorm" in name:
            return None
    return model.double()


@every_model
@every_batch
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.float64, DOUBLE)], ids=str)
def test_packed_rows_give_the_hidden_states_of_padded_ones(make, batch, dtype, tolerance):
    model = make().to(dtype)  # most norms round states to float32, and both ways round alike
    with torch.no_grad():
        expected = score(model, padded(batch), VOCAB).hidden
        assert packs(model)
        shapes = lengths_seen(model)
        found = score(model, batch, VOCAB).hidden
    assert shapes == [tuple(batch.packed.input_ids.shape)]
    assert_same([found], [expected], tolerance)


def loss_and_gradients(model, batch, loss):
    """Total, and the gradient of every parameter, of a loss with a random teacher."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(batch.num_tokens, VOCAB, generator=generator, dtype=torch.float64).to(model.dtype)
    model.zero_grad()
    total = loss(score(model, batch, VOCAB), Scores.from_logits(logits), batch).total.sum()
    total.backward()
    gradients = [own.grad for own in model.parameters()]
    assert all(own is not None for own in gradients)
    return total.detach(), *gradients


def assert_trained_alike(model, checkpointing, tolerance):
    """In training mode without dropout, packed and padded rows give the same losses and gradients."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for own in model.modules():
        if isinstance(own, nn.Dropout):
            own.p = 0.0
    for loss in (ForwardKL(), DistiLLM2(alpha=0.1)):
        expected = loss_and_gradients(model, padded(SHARED), loss)
        assert len(expected) > 10
        for batch in BATCHES.values():
            assert_same(loss_and_gradients(model, batch, loss), expected, tolerance)
    assert packs(model)


every_way = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])


@every_model
@every_way
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(make, checkpointing):
    assert_trained_alike(make(), checkpointing, SINGLE)


IN_FLOAT64 = [name for name, make in MODELS.items() if in_float64(make()) is not None]


@pytest.mark.parametrize("name", IN_FLOAT64)
@every_way
def test_in_float64_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(name, checkpointing):
    assert len(IN_FLOAT64) == 6
    assert_trained_alike(in_float64(MODELS[name]()), checkpointing, DOUBLE)


def test_layers_are_called_again_in_the_backward_pass_where_checkpoints_are_wanted():
    model = made(LlamaForCausalLM, LlamaConfig).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packs(model)
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["packed"]), with_kwargs=True
    )
    score(model, SHARED, VOCAB).hidden.sum().backward()
    assert len(calls) == 2
    assert all(line is SHARED.packed for line in calls)


def test_adapters_get_the_gradients_of_padded_rows():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(VOCAB, tie_word_embeddings=False), config)
    expected = [own.clone() for own in gradients_of_adapters(model, padded(SHARED))]
    assert packs(model)
    assert_same(gradients_of_adapters(model, SHARED), expected, 1e-5)


def gradients_of_adapters(model, batch):
    model.zero_grad()
    score(model, batch, VOCAB).log_probs()[:, 0].sum().backward()
    found = [own.grad for own in model.parameters() if own.requires_grad]
    assert len(found) == 10  # two matrices for each of two layers' two projections, and for the head
    return found


def test_in_bfloat16_packed_rows_differ_by_rounding():
    model = made(LlamaForCausalLM, LlamaConfig).bfloat16()
    with torch.no_grad():
        expected = score(model, padded(SHARED), VOCAB).hidden.float()
        found = score(model, SHARED, VOCAB).hidden.float()
    assert packs(model)
    assert (found - expected).norm() < 2e-2 * expected.norm()  # 8 bits, two layers; measured: 5e-3


def test_dropout_of_attention_drops_in_training_and_never_in_evaluation():
    model = made(LlamaForCausalLM, LlamaConfig, attention_dropout=0.5)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = score(model, padded(SHARED), VOCAB).hidden
        assert_same([score(model, SHARED, VOCAB).hidden], [expected], 1e-5)
        model.train()
        first, second = (score(model, SHARED, VOCAB).hidden for _ in range(2))
    assert first.isfinite().all()
    assert (first - expected).abs().max() > 1e-2
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("cap", [50.0, 5.0])
def test_a_cap_on_scores_is_kept_as_the_models_eager_attention_keeps_it(cap):
    # transformers' own sdpa leaves the cap out, so that padded rows differ: by 3e-5 at 50, by 3e-3 at 5.
    settings = {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": cap}
    model = made(Gemma2ForCausalLM, Gemma2Config, **settings)
    eager = made(Gemma2ForCausalLM, Gemma2Config, attn_implementation="eager", **settings)
    assert not packs(eager)
    assert packs(model)
    expected = loss_and_gradients(eager, SHARED, ForwardKL())
    for batch in BATCHES.values():
        assert_same(loss_and_gradients(model, batch, ForwardKL()), expected, SINGLE)


# Models that can't.


def assert_is_given_padded_rows(model, batch, caplog):
    own = model.config.get_text_config()._attn_implementation
    shapes = lengths_seen(model)
    with caplog.at_level(logging.INFO, logger="distillkit.models.capabilities"), torch.no_grad():
        found = score(model, batch, VOCAB).hidden
        assert shapes[-1] == tuple(batch.input_ids.shape)
        assert_same([found], [score(model, padded(batch), VOCAB).hidden], 1e-6)
        score(model, batch, VOCAB)
    assert not packs(model)
    assert model.config.get_text_config()._attn_implementation == own
    (said,) = [record.getMessage() for record in caplog.records if record.name == "distillkit.models.capabilities"]
    return said  # once, not at each batch


def test_eager_attention_is_given_padded_rows(caplog):
    model = made(LlamaForCausalLM, LlamaConfig, attn_implementation="eager")
    said = assert_is_given_padded_rows(model, SHARED, caplog)
    assert said == (
        "LlamaForCausalLM runs on padded rows: its attention implementation is eager; only sdpa supports packed rows"
    )


def test_a_model_without_attention_is_given_padded_rows(caplog):
    model = made(MambaForCausalLM, MambaConfig, state_size=4)
    assert "MambaForCausalLM runs on padded rows: its attention implementation is" in assert_is_given_padded_rows(
        model, SHARED, caplog
    )


def test_a_model_whose_state_runs_over_the_line_is_given_padded_rows(caplog):
    config = {"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "attn_layer_offset": 1}
    model = made(JambaForCausalLM, JambaConfig, **config)
    assert model.config._attn_implementation == "sdpa"
    said = assert_is_given_padded_rows(model, SHARED, caplog)
    assert said == (
        "JambaForCausalLM runs on padded rows: some of its layers carry a state from each token to the next"
    )


class Narrow(LlamaModel):
    """Takes no argument that it does not know."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        inputs_embeds=None,
    ):
        inputs = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask, position_ids, **inputs)


def test_a_model_that_refuses_the_line_is_given_padded_rows(caplog):
    model = made(LlamaForCausalLM, LlamaConfig)
    model.model.__class__ = Narrow
    said = assert_is_given_padded_rows(model, SHARED, caplog)
    assert "LlamaForCausalLM runs on padded rows: a test with packed rows fails with TypeError" in said
    assert "'packed'" in said


@pytest.mark.parametrize("training", [True, False])
def test_finding_out_leaves_mode_gradients_and_random_state_alone(training):
    model = made(LlamaForCausalLM, LlamaConfig, attention_dropout=0.5).train(training)
    model.model.layers[0].eval()
    modes, state = [own.training for own in model.modules()], torch.get_rng_state()
    assert packs(model)
    assert [own.training for own in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(own.grad is None for own in model.parameters())


# What others see of it.


def test_a_saved_model_does_not_name_the_packed_attention(tmp_path):
    model = made(LlamaForCausalLM, LlamaConfig)
    before = model.config.to_dict()
    assert packs(model)
    assert model.config._attn_implementation == packing.NAME
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert packing.NAME not in file.read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert_same([score(loaded, SHARED, VOCAB).hidden], [score(model, SHARED, VOCAB).hidden], 1e-6)


def test_a_copy_packs_as_its_model_does():
    model = made(LlamaForCausalLM, LlamaConfig)
    assert packs(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert_same([score(twin, SHARED, VOCAB).hidden], [score(model, padded(SHARED), VOCAB).hidden], 1e-5)


TOKENIZER = tiny_tokenizer()
PROMPTS = Prompts(
    tuple(
        Prompt(str(number), ({"role": "user", "content": "x"},), tokens(number, torch.Generator().manual_seed(number)))
        for number in (3, 11, 1, 7, 16)
    )
)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0, max_new_tokens=12), Sampling(max_new_tokens=12)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(len(TOKENIZER)),
        lambda: made(
            Gemma2ForCausalLM,
            Gemma2Config,
            vocab_size=len(TOKENIZER),
            head_dim=8,
            sliding_window=4,
            tie_word_embeddings=False,
            attn_logit_softcapping=5.0,
        ),
    ],
    ids=["llama", "gemma2"],
)
def test_the_same_text_is_generated_before_and_after(make, sampling):
    model = make()
    generator = TransformersGenerator(batch_size=2, progress=False)
    generator.refresh(model, TOKENIZER)
    before = generator.generate(PROMPTS, sampling)
    assert packs(model)
    score(model, SHARED, VOCAB)
    assert generator.generate(PROMPTS, sampling) == before


def test_transformers_generates_the_same_tokens_before_and_after():
    model = made(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ids = torch.tensor([PROMPTS[1].input_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    before = model.generate(ids, **options)
    assert packs(model)
    assert torch.equal(model.generate(ids, **options), before)


def test_no_mask_of_the_whole_line_is_made(monkeypatch):
    # Its size would be the square of the batch's.
    model = MODELS["gemma3"]()
    assert packs(model)
    made_of, masks = [], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    make = masks[packing.NAME]
    monkeypatch.setitem(masks, packing.NAME, lambda *args, **kwargs: made_of.append(1) or make(*args, **kwargs))
    with torch.no_grad():
        score(model, SHARED, VOCAB)
        assert made_of == []
        score(model, padded(SHARED), VOCAB)
    assert made_of == [1, 1]  # one for each kind of layer


def test_calls_that_are_not_packed_are_unchanged_to_the_last_bit():
    model = made(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with torch.no_grad():
        before = model(SHARED.input_ids, attention_mask=SHARED.attention_mask.long()).logits
        assert packs(model)
        score(model, SHARED, VOCAB)
        assert torch.equal(model(SHARED.input_ids, attention_mask=SHARED.attention_mask.long()).logits, before)
