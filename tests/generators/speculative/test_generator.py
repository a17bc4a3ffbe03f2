import logging
from dataclasses import replace

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from distillkit.curators.single import DatasetCurator
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.speculative.acceptance import Acceptance, Exact, TopK, Typical
from distillkit.generators.speculative.generator import SpeculativeGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import CrossEntropy
from distillkit.models.fingerprint import fingerprint
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.stored import Ranks
from distillkit.storage.responses import ResponseStore
from distillkit.training.checks import check_parts
from distillkit.types import Prompts, Sampling
from helpers.models import tiny_model, tiny_tokenizer
from helpers.pairs import gemma2, near, pair, prompts_of

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
PROMPTS = prompts_of(VOCAB)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12, seed=3)
RULES = [{"rule": "exact"}, {"rule": "top_k", "top_k": 30}, {"rule": "typical"}]


def teacher_and_student(make=lambda: tiny_model(VOCAB), share=12):
    """A pair that agrees in part, with every `share`-th token as an end of turn."""
    teacher = make()
    teacher.generation_config.eos_token_id = list(range(1, VOCAB, share))
    return teacher, near(teacher)


def ready(student, teacher, **settings):
    generator = SpeculativeGenerator(**{"progress": False} | settings)
    generator.refresh(pair(student, teacher), TOKENIZER)
    return generator


def alone(model, prompts=PROMPTS, sampling=GREEDY):
    """What one model writes without another."""
    generator = TransformersGenerator(progress=False)
    generator.refresh(model, TOKENIZER)
    return tokens_of(generator.generate(prompts, sampling))


def tokens_of(responses):
    return [response.token_ids for response in responses]


# ── greedy: what it must be, token for token ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("make", [lambda: tiny_model(VOCAB), lambda: gemma2(VOCAB)], ids=["llama", "gemma2"])
def test_greedy_exact_and_typical_text_is_the_teachers(make, block):
    teacher, student = teacher_and_student(make)
    expected = alone(teacher)
    assert len({len(tokens) for tokens in expected}) > 1  # some end early
    for rule in ("exact", "typical"):
        generator = ready(student, teacher, rule=rule, block=block)
        assert tokens_of(generator.generate(PROMPTS, GREEDY)) == expected
        assert 0.2 < generator.acceptance.rate < 1.0


def test_so_small_a_top_p_that_one_token_is_left_is_greedy_too():
    teacher, student = teacher_and_student()
    narrow = Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=12)
    generator = ready(student, teacher)
    assert tokens_of(generator.generate(PROMPTS, narrow)) == alone(teacher)
    assert generator.acceptance.accepted < generator.acceptance.judged  # where they differ, nothing is shared


def test_the_whole_vocabulary_as_top_k_leaves_the_students_text_and_1_the_teachers():
    teacher, student = teacher_and_student(lambda: gemma2(VOCAB))
    student.generation_config = teacher.generation_config
    assert alone(student) != alone(teacher)
    for k, model in ((VOCAB, student), (1, teacher)):
        generator = ready(student, teacher, rule="top_k", top_k=k, block=3)
        assert tokens_of(generator.generate(PROMPTS, GREEDY)) == alone(model)


# ── what a response depends on ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["rule"])
def test_a_response_depends_on_neither_batch_size_nor_neighbours(settings):
    teacher, student = teacher_and_student()
    generator = ready(student, teacher, **settings)
    one_by_one = [tokens_of(generator.generate(PROMPTS[i : i + 1], WARM))[0] for i in range(len(PROMPTS))]
    assert 0.1 < generator.acceptance.rate < 1.0
    assert tokens_of(generator.generate(PROMPTS, WARM)) == one_by_one
    backwards = Prompts(tuple(reversed(PROMPTS.items)))
    assert tokens_of(ready(student, teacher, batch_size=3, **settings).generate(backwards, WARM)) == one_by_one[::-1]


@pytest.mark.parametrize("settings", RULES[1:], ids=lambda settings: settings["rule"])
def test_without_a_token_of_the_teachers_own_the_length_of_a_block_changes_nothing(settings):
    teacher, student = teacher_and_student()
    found = [tokens_of(ready(student, teacher, block=n, **settings).generate(PROMPTS, WARM)) for n in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_the_seed_and_the_round_change_what_is_written():
    generator = ready(*teacher_and_student()[::-1])
    first = tokens_of(generator.generate(PROMPTS, WARM))
    assert tokens_of(generator.generate(PROMPTS, WARM)) == first
    assert tokens_of(generator.generate(PROMPTS.at_round(1), WARM)) != first
    assert tokens_of(generator.generate(PROMPTS, replace(WARM, seed=4))) != first


def test_no_prompts_give_no_responses():
    assert ready(*teacher_and_student()).generate(Prompts(()), WARM) == []


# ── where a response ends ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["rule"])
def test_an_end_of_turn_within_an_accepted_block_is_the_last_token(settings):
    teacher, _ = teacher_and_student(share=12)
    ends = set(teacher.generation_config.eos_token_id)
    generator = ready(teacher, teacher, block=12, **settings)
    responses = generator.generate(PROMPTS, WARM)
    assert {response.finish for response in responses} == {"stop", "length"}
    assert any(1 < len(response.token_ids) < 12 for response in responses)
    for response in responses:
        assert not ends & set(response.token_ids[:-1])
        assert (response.finish == "stop") == (response.token_ids[-1] in ends)
    # Whatever was drafted behind the end was never judged.
    assert generator.acceptance.judged == sum(len(response.token_ids) for response in responses)


@pytest.mark.parametrize("longest", [1, 3, 6])
def test_a_response_is_cut_at_its_longest_within_a_block(longest):
    teacher, student = teacher_and_student(share=400)
    sampling = Sampling(temperature=0.0, max_new_tokens=longest)
    responses = ready(student, teacher, block=4).generate(PROMPTS, sampling)
    assert {(len(response.token_ids), response.finish) for response in responses} == {(longest, "length")}
    assert tokens_of(responses) == alone(teacher, sampling=sampling)


# ── how the work is done ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["rule"])
def test_a_student_that_is_the_teacher_has_all_of_its_tokens_kept(settings):
    teacher, _ = teacher_and_student(share=400)
    generator = ready(teacher, teacher, block=3, **settings)
    if settings["rule"] != "exact":
        generator.rule = TopK(VOCAB) if settings["rule"] == "top_k" else Typical(1e-30, 1.0)
    generator.generate(PROMPTS, WARM)
    counts = generator.acceptance
    # Twelve tokens: four blocks of three, or three of three and the teacher's own.
    assert (counts.rate, counts.tokens, counts.checks) == (
        (1.0, 84, 21) if settings["rule"] == "exact" else (1.0, 84, 28)
    )


def test_the_teacher_reads_a_block_in_one_forward_pass_and_rows_that_end_leave():
    teacher, student = teacher_and_student(share=6)
    ready(student, teacher).generate(PROMPTS, GREEDY)  # the first call tries both models
    shapes = []
    handle = teacher.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generator = ready(student, teacher, block=3)
    responses = generator.generate(PROMPTS, replace(WARM, max_new_tokens=60))
    handle.remove()
    assert shapes[0] == (7, 16 + 3)
    assert {width for _, width in shapes[1:-1]} == {1 + 3}
    assert sum(rows for rows, _ in shapes) == generator.acceptance.checks
    assert shapes[-1][0] < 7
    assert sum(len(response.token_ids) for response in responses) == generator.acceptance.tokens > len(shapes)


def test_logits_that_the_tokenizer_lacks_are_cut_on_both_sides():
    teacher, student = tiny_model(VOCAB + 300), tiny_model(VOCAB + 8)
    with torch.no_grad():
        student.get_input_embeddings().weight[:VOCAB] = teacher.get_input_embeddings().weight[:VOCAB]
    hot = Sampling(temperature=5.0, top_p=1.0, max_new_tokens=12)
    for settings in RULES:
        for response in ready(student, teacher, **settings).generate(PROMPTS, hot):
            assert max(response.token_ids) < VOCAB
    assert tokens_of(ready(student, teacher).generate(PROMPTS, GREEDY)) == alone(teacher)


def test_exact_responses_come_with_what_the_teacher_says_of_their_tokens():
    teacher, student = teacher_and_student()
    for prompt, response in zip(PROMPTS, ready(student, teacher).generate(PROMPTS, WARM), strict=True):
        ids = torch.tensor([prompt.input_ids + response.token_ids])
        with torch.no_grad():
            said = teacher(ids).logits[0].log_softmax(-1)[len(prompt.input_ids) - 1 : -1]
        expected = said.gather(-1, torch.tensor(response.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", RULES[1:], ids=lambda settings: settings["rule"])
def test_other_responses_are_neither_models_and_come_without(settings):
    teacher, student = teacher_and_student()
    assert {response.log_probs for response in ready(student, teacher, **settings).generate(PROMPTS, WARM)} == {()}


def test_modes_gradients_and_the_global_random_state_are_left_alone():
    teacher, student = teacher_and_student()
    student.train()
    student.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    ready(student, teacher).generate(PROMPTS, WARM)
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())


def test_a_model_that_keeps_a_state_is_refused():
    config = Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        eos_token_id=1,
        bos_token_id=None,
    )
    with pytest.raises(ModelError, match="Lfm2ForCausalLM keeps more than the keys and values of padded rows"):
        ready(Lfm2ForCausalLM(config), tiny_model(VOCAB)).generate(PROMPTS, WARM)


# ── what is said of a round ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_rate_is_counted_from_refresh_on_and_logged(caplog):
    teacher, student = teacher_and_student()
    generator = ready(student, teacher)
    assert (generator.acceptance, generator.metrics()) == (Acceptance(), {})
    with caplog.at_level(logging.INFO, logger="distillkit"):
        generator.generate(PROMPTS.at_round(5), WARM)
    counts = generator.acceptance
    assert (
        f"the teacher accepted {counts.accepted} of {counts.judged} draft tokens in round 5 "
        f"({100 * counts.accepted / counts.judged:.1f} %), {counts.tokens / counts.checks:.2f} tokens per forward pass"
    ) in caplog.text
    assert generator.metrics() == {"acceptance": counts.rate, "tokens_per_check": counts.tokens_per_check}
    generator.refresh(pair(student, teacher), TOKENIZER)
    assert generator.acceptance == Acceptance()


def writers(folder, student, teacher, **settings):
    models = {"student": lambda: student, "teacher": lambda: teacher}
    own = SpeculativeGenerator(progress=False, **settings)
    return GeneratorPool(
        TransformersGenerator(),
        ResponseStore(folder),
        models,
        TOKENIZER,
        Ranks(),
        curator_generators={"speculative": own},
    )


def test_both_weights_the_rule_and_its_settings_are_part_of_where_a_response_comes_from(tmp_path):
    teacher, student = teacher_and_student()
    for settings in (*RULES, {"rule": "top_k", "top_k": 4}, {"rule": "exact", "block": 2}):
        writers(tmp_path, student, teacher, **settings).generators["speculative"].generate(PROMPTS[:1], WARM)
    both = f"{fingerprint(student)}+{fingerprint(teacher)}+speculative "
    assert [shard["model"] for shard in ResponseStore(tmp_path).shards()] == [
        both + "Exact() block=4",
        both + "TopK(k=30) block=4",
        both + "Typical(epsilon=0.09, delta=0.3) block=4",
        both + "TopK(k=4) block=4",
        both + "Exact() block=2",
    ]


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["rule"])
def test_a_resumed_round_is_that_of_a_run_that_was_never_stopped(tmp_path, settings):
    teacher, student = teacher_and_student()
    whole = writers(tmp_path / "whole", student, teacher, **settings).generators["speculative"]
    expected = tokens_of(whole.generate(PROMPTS, WARM))
    first = writers(tmp_path / "parts", student, teacher, **settings).generators["speculative"]
    first.generate(PROMPTS[:4], WARM)
    resumed = writers(tmp_path / "parts", student, teacher, **settings)
    assert tokens_of(resumed.generators["speculative"].generate(PROMPTS, WARM)) == expected
    assert resumed.metrics().keys() == {"speculative/acceptance", "speculative/tokens_per_check"}
    again = writers(tmp_path / "parts", student, teacher, **settings)
    assert tokens_of(again.generators["speculative"].generate(PROMPTS, WARM)) == expected
    assert again.metrics() == {}  # read, not written


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_the_papers():
    assert SpeculativeGenerator().rule == Exact()
    assert SpeculativeGenerator("top_k").rule == TopK(25)
    assert SpeculativeGenerator("typical").rule == Typical(0.09, 0.3)
    assert SpeculativeGenerator("typical", epsilon=0.04).rule == Typical(0.04, 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, r"block must be at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"rule": "top_k", "top_k": 0}, r"top_k must be at least 1, got 0"),
        ({"rule": "typical", "epsilon": 0.0}, r"epsilon must lie strictly between 0 and 1, got 0\.0"),
        ({"rule": "typical", "epsilon": 1.0}, r"epsilon must lie strictly between 0 and 1, got 1\.0"),
        ({"rule": "typical", "delta": 0.0}, r"delta must lie in \(0, 1\], got 0\.0"),
        ({"rule": "typical", "delta": 1.5}, r"delta must lie in \(0, 1\], got 1\.5"),
        ({"rule": "lossy"}, r"rule must be exact, top_k or typical, got 'lossy'"),
        ({"top_k": 25}, r"top_k belongs to the rule top_k, but rule is exact. Remove it"),
        ({"rule": "typical", "top_k": 0}, r"top_k belongs to the rule top_k, but rule is typical"),
        ({"rule": "top_k", "epsilon": 0.0}, r"epsilon belongs to the rule typical, but rule is top_k"),
        ({"rule": "exact", "delta": 0.3}, r"delta belongs to the rule typical, but rule is exact"),
    ],
)
def test_settings_out_of_range_or_of_another_rule_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"SpeculativeGenerator\.{message}"):
        SpeculativeGenerator(**settings)


def test_it_can_not_be_the_generator_of_a_whole_run():
    with pytest.raises(
        ConfigError, match="a SpeculativeGenerator generates with student and teacher together: set it as the"
    ):
        check_parts(CrossEntropy(), None, DatasetCurator(), SpeculativeGenerator(), Sampling())
