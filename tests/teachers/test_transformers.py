import torch

from distillkit.data.collate import collate
from distillkit.models import loading
from distillkit.models.loading import load_model
from distillkit.teachers.transformers import TransformersTeacher
from helpers.models import save_tiny
from helpers.scores import CPU, WIDTH, some_rows


def test_an_unloaded_teacher_holds_no_weights_and_says_the_same_once_it_is_set_up_again(source):
    teacher = TransformersTeacher(str(source), "float32")
    teacher.unload()
    teacher.setup(CPU)
    teacher.limit_vocab(WIDTH - 3)
    batch = collate(some_rows(3), 1)
    before, held = teacher.score(batch).log_probs(), teacher.model
    teacher.unload()
    assert teacher.model is None
    assert {parameter.device.type for parameter in held.parameters()} == {"meta"}, "a generator may hold it"
    assert teacher.vocab_size == WIDTH - 3
    teacher.setup(CPU)
    teacher.setup(CPU)
    assert torch.equal(teacher.score(batch).log_probs(), before)


def test_the_identity_depends_on_class_and_type_of_the_weights(source):
    class Other(TransformersTeacher):
        pass

    teachers = [TransformersTeacher(str(source)), TransformersTeacher(str(source), "float32"), Other(str(source))]
    assert len({teacher.identity() for teacher in teachers}) == 3
    assert teachers[0].identity() == TransformersTeacher(str(source)).identity()
    assert {teacher.fingerprint() for teacher in teachers} == {None}


def test_weights_in_a_type_without_instructions_keep_their_values_in_float32(tmp_path, monkeypatch, caplog):
    source = str(save_tiny(tmp_path / "teacher"))
    monkeypatch.setattr(loading, "fast_dtype", lambda dtype, device: torch.float32)
    caplog.set_level("INFO", "distillkit")
    teacher = TransformersTeacher(source, "bfloat16")
    teacher.setup(torch.device("cpu"))
    kept = load_model(source, "bfloat16").state_dict()
    for name, own in teacher.model.state_dict().items():
        assert own.dtype == torch.float32
        assert torch.equal(own, kept[name].float())
    assert [record.getMessage() for record in caplog.records] == [
        f"teacher {source}: this processor has no instructions for bfloat16, so it runs in float32"
    ]
