"""Settings and refusals of the generator that runs vLLM; what vLLM writes is in test_engine.py."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.vllm import engine as vllm_engine
from distillkit.generators.vllm.generator import SpeculativeDecoding, VLLMGenerator
from distillkit.losses.kl import ForwardKL
from distillkit.models.merging import merge_lora
from distillkit.models.student import Lora, Student
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.training.module import DistillModule
from distillkit.types import Sampling
from helpers.models import save_tiny, tiny_model

GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=0.8)


@pytest.fixture
def as_if_installed(monkeypatch):
    """Settings can be looked at where vLLM is not installed."""
    monkeypatch.setattr(vllm_engine, "require_vllm", lambda name: None)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(vllm_engine, "on_cpu", lambda: True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"VLLMGenerator\.batch_size must be at least 1, got 0"),
        ({"max_model_len": 0}, r"VLLMGenerator\.max_model_len must be at least 1, got 0"),
        ({"gpu_memory_utilization": 0.0}, r"VLLMGenerator\.gpu_memory_utilization must lie in \(0, 1\], got 0\.0"),
        ({"kv_cache": 0.0}, r"VLLMGenerator\.kv_cache must be above 0 GiB, got 0\.0"),
        ({"engine": {"seed": 1}}, r"VLLMGenerator\.engine can't set seed: the requirements on a response fix"),
        ({"engine": {"max_num_seqs": 8}}, r"engine can't set max_num_seqs: use VLLMGenerator\.batch_size"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VLLMGenerator(**settings)


@pytest.mark.parametrize("name", ["num_tokens", "max_ngram"])
def test_drafts_of_no_token_are_refused(name):
    with pytest.raises(ConfigError, match=rf"SpeculativeDecoding\.{name} must be at least 1, got 0"):
        SpeculativeDecoding(**{name: 0})


def test_a_missing_vllm_is_said_before_any_model_is_looked_for(monkeypatch):
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"VLLMGenerator needs vLLM, which is not installed. On a GPU machine run pip"
    ):
        VLLMGenerator(source="./nowhere")


@pytest.mark.usefixtures("as_if_installed")
@pytest.mark.parametrize("settings", [{"source": "./nowhere"}, {"speculative": SpeculativeDecoding(draft="./nowhere")}])
def test_a_folder_that_does_not_exist_is_refused_at_once(settings):
    with pytest.raises(ModelError, match=r"\./nowhere does not exist"):
        VLLMGenerator(**settings)


@pytest.mark.usefixtures("as_if_installed")
def test_a_copy_has_the_settings_and_an_engine_of_its_own():
    generator = VLLMGenerator(batch_size=7, dtype="bfloat16", engine={"enable_prefix_caching": False})
    other = copy.deepcopy(generator)
    assert vars(other) == vars(generator)
    assert other.engine is not generator.engine


@pytest.mark.usefixtures("as_if_installed", "on_cpu")
def test_the_engine_gets_the_settings_and_the_users_own_arguments():
    generator = VLLMGenerator(batch_size=7, kv_cache=0.5, engine={"enable_prefix_caching": False})
    options = generator._options("float32")
    assert (options["max_num_seqs"], options["kv_cache_memory_bytes"], options["dtype"]) == (7, 2**29, "float32")
    assert options["enforce_eager"] is True
    assert options["enable_prefix_caching"] is False
    assert options["generation_config"] == "vllm"  # nothing of the model's own


def drafting():
    return VLLMGenerator(speculative=SpeculativeDecoding())


REFUSED = r"VLLMGenerator\.speculative generates wrong tokens on the CPU at a temperature above 0, got 0\.8"


@pytest.mark.usefixtures("as_if_installed", "on_cpu")
@pytest.mark.parametrize(
    "curator",
    [
        lambda: TeacherCurator(WARM, generator=drafting()),
        lambda: PairedCurator(TeacherCurator(GREEDY), StudentCurator(WARM, generator=drafting())),
    ],
)
def test_drafts_at_a_temperature_on_the_cpu_are_refused_when_a_curator_is_made(curator):
    with pytest.raises(ConfigError, match=REFUSED):
        curator()


@pytest.mark.usefixtures("as_if_installed", "on_cpu")
@pytest.mark.parametrize(
    ("curator", "answers"),
    [
        (PairedCurator(TeacherCurator(WARM), StudentCurator(GREEDY)), GREEDY),
        (TeacherCurator(GREEDY), WARM),
    ],
    ids=["curator", "answers"],
)
def test_drafts_at_a_temperature_on_the_cpu_are_refused_before_a_run_loads_a_model(curator, answers):
    parts = {"student": Student("no/such"), "teacher": TransformersTeacher("no/such"), "loss": ForwardKL()}
    with pytest.raises(ConfigError, match=REFUSED):
        DistillModule(**parts, curator=curator, answers=answers, generator=drafting())


@pytest.mark.usefixtures("as_if_installed", "on_cpu")
def test_drafts_are_taken_at_temperature_0_and_a_temperature_without_drafts():
    drafting().check(GREEDY)
    VLLMGenerator().check(WARM)
    TeacherCurator(GREEDY, generator=drafting())


@pytest.mark.usefixtures("as_if_installed")
def test_a_temperature_that_vllm_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"temperatures up to 2, got Sampling\.temperature = 2\.5"):
        StudentCurator(Sampling(temperature=2.5), generator=VLLMGenerator())


@pytest.mark.usefixtures("as_if_installed")
def test_a_model_of_its_own_is_named_by_its_weights_not_by_its_folder(tmp_path):
    one, same, other = (save_tiny(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = [VLLMGenerator(source=str(folder)).identity() for folder in (one, same, other)]
    assert names[0] == names[1] != names[2]
    assert VLLMGenerator(source=str(one)).needs_models == ()
    assert VLLMGenerator().identity() is None
    assert VLLMGenerator().needs_models is None


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_has_the_weights_and_no_token_beyond_the_tokenizers(tmp_path, monkeypatch, tied, cpu):
    monkeypatch.setattr(vllm_engine, "on_cpu", lambda: cpu)
    model = tiny_model(350, tie_word_embeddings=tied)
    vllm_engine.save(model, 320, tmp_path / "cut")
    again = Student(str(tmp_path / "cut")).load()
    ids = torch.tensor([[3, 5, 300]])
    assert again.config.vocab_size == 320
    assert again.config.tie_word_embeddings == (tied and not cpu)
    torch.testing.assert_close(again(ids).logits, model(ids).logits[..., :320], rtol=0, atol=1e-6)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 350  # the model itself is whole
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("cpu", [True, False])
def test_the_tensors_for_a_running_engine_are_those_of_the_folder(tmp_path, monkeypatch, cpu):
    monkeypatch.setattr(vllm_engine, "on_cpu", lambda: cpu)
    loader = Student(str(save_tiny(tmp_path / "base")), lora=Lora(r=2))
    merged = merge_lora(loader.load())
    vllm_engine.save(merged, 320, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    found = dict(vllm_engine.checkpoint_tensors(merged, 320))
    assert ("lm_head.weight" in found) == cpu  # the head is tied: on the CPU it goes by itself
    assert found.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in found.items())
