"""Chat with a student and its teacher: the models of a run or of an exported folder, each with its conversation."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub.repocard import metadata_load
from lightning import LightningDataModule, LightningModule
from torch import nn
from transformers import TextStreamer

from distillkit.callbacks.model_card import teacher_settings
from distillkit.data.chat_templates import TEACHER
from distillkit.data.template_spans import render, tokenise
from distillkit.devices.precision import default_device
from distillkit.devices.stopping import StopRequested
from distillkit.errors import ConfigError, DistillKitError, ModelError, readable
from distillkit.models.checkpoint import quiet
from distillkit.models.loading import Dtype, for_inference, load_model
from distillkit.models.options import SourceOptions
from distillkit.models.positions import configured_length
from distillkit.models.sources import is_adapter
from distillkit.models.structure import base_model
from distillkit.models.tokenizers import eos_ids, load_tokenizer
from distillkit.run_folder import CONFIG, EXPORT
from distillkit.training.checkpoint import Checkpoint
from distillkit.types import Tokenizer
from distillkit.workflows.checkpoints import choose_checkpoint

_log = logging.getLogger(__name__)

_MODEL, _DATA = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY


@dataclass(frozen=True)
class Subject:
    """A student to talk to, and what is recorded of its training.

    Args:
        source: The exported folder or other model source; None if the student is that of a checkpoint.
        checkpoint: The checkpoint; None if the student is a model source.
        teacher: Settings of the teacher, of which `source` is one; None if none is recorded.
        system: System message of its training prompts; None if they had none.
        uses_template: Whether its prompts went through the chat template.
    """

    source: str | None
    checkpoint: Path | None = None
    teacher: Mapping[str, Any] | None = None
    system: str | None = None
    uses_template: bool = True

    def __str__(self) -> str:
        return str(self.checkpoint or self.source)


def find_subject(source: str) -> Subject:
    """The student of a run or a folder.

    Of a run it is the exported one, unless a checkpoint is newer.

    Args:
        source: Folder of a run, a checkpoint, an exported folder, or another model source.

    Raises:
        ConfigError: If a run has no checkpoint.
    """
    path = Path(source)
    if path.suffix == ".ckpt":
        return _of_checkpoint(path)
    if not path.is_dir() or (path / "config.json").is_file() or is_adapter(path):
        run = path.parent if path.name == EXPORT and (path.parent / CONFIG).is_file() else None
        return _of_card(path) if run is None else _of_config(run, path)
    export, saved = path / EXPORT, list(path.glob("checkpoints/*.ckpt"))
    newest = max((file.stat().st_mtime_ns for file in saved), default=0)
    if (path / CONFIG).is_file() and export.is_dir() and export.stat().st_mtime_ns >= newest:
        return _of_config(path, export)
    return _of_checkpoint(choose_checkpoint(path)[0])


def _of_config(run: Path, folder: Path) -> Subject:
    """The export of a run, by the run's saved configuration."""
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    data = config.get("data") or {}
    teacher = teacher_settings((config.get("model") or {}).get("teacher"))
    return Subject(str(folder), None, teacher, data.get("system"), data.get("chat") is not False)


def _of_checkpoint(path: Path) -> Subject:
    content = Checkpoint.read(path).content
    data, teacher = content.get(_DATA, {}), teacher_settings(content[_MODEL].get("teacher"))
    return Subject(None, path, teacher, data.get("system"), data.get("chat") is not False)


def _of_card(folder: Path) -> Subject:
    card = folder / "README.md"
    try:
        header = (metadata_load(card) if card.is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card that can't be read tells nothing
        header = {}
    ours = header.get("distillkit")
    ours = ours if isinstance(ours, dict) else {}
    teacher = {"source": ours["teacher"]} if isinstance(ours.get("teacher"), str) else None
    return Subject(str(folder), None, teacher, ours.get("system"), ours.get("chat") is not False)


@dataclass
class Speaker:
    """A model that answers, with a conversation of its own.

    Args:
        name: Its role, such as `student`.
        origin: Its source, for the user.
        model: A transformers causal language model.
        tokenizer: The tokenizer with the chat template of its prompts.
        uses_template: Whether prompts go through the chat template.
        messages: The conversation so far.
    """

    name: str
    origin: str
    model: nn.Module
    tokenizer: Tokenizer
    uses_template: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def start(self, system: str | None) -> None:
        """Begins a new conversation.

        Args:
            system: Its system message; None is none.

        Raises:
            ConfigError: If there is a system message and the prompts are plain text.
        """
        if system and not self.uses_template:
            raise ConfigError(f"--system needs a chat template, which the {self.name} {self.origin} does not use.")
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, max_new_tokens: int, temperature: float, show: Callable[[str], None]) -> None:
        """Answers a message and adds both to the conversation, of an answer that a signal stops what there is of it.

        Args:
            text: The message.
            max_new_tokens: Longest answer in tokens; it is shorter where the model's positions end before.
            temperature: Temperature of the sampling; 0 takes the most likely token.
            show: Takes each piece of the answer.

        Raises:
            DataError: If the chat template refuses the conversation.
            ModelError: If the conversation is longer than the model's context.
            StopRequested: If a signal stops the answer.
        """
        conversation = [*self.messages, {"role": "user", "content": text}]
        ids, limit = self._encode(conversation), configured_length(self.model)
        if limit is not None and len(ids) >= limit:
            raise ModelError(
                f"The conversation has {len(ids)} tokens, and the {self.name} reads {limit}: /new starts anew."
            )
        ends = eos_ids(self.tokenizer, base_model(self.model))
        stream, input_ids = _Stream(self.tokenizer, show, ends), torch.tensor([ids], device=self._device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        try:
            with quiet(), torch.inference_mode():
                self.model.generate(  # type: ignore[operator]
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    **sampling,
                    streamer=stream,
                    max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids)),
                    eos_token_id=list(ends),
                    pad_token_id=self.tokenizer.pad_token_id,
                )
        except StopRequested:
            stream.end()
            raise
        finally:
            self.messages = [*conversation, {"role": "assistant", "content": stream.text}]

    @property
    def _device(self) -> torch.device:
        device: torch.device = base_model(self.model).device
        return device

    def _encode(self, conversation: list[dict[str, str]]) -> tuple[int, ...]:
        """The token ids of the prompt."""
        if self.uses_template:
            return tokenise(self.tokenizer, [render(conversation, self.tokenizer, True, "The conversation")])[0]
        return tuple(self.tokenizer.encode("\n".join(message["content"] for message in conversation)))


class _Stream(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """The pieces of an answer as they are generated, without the end of the turn, as text that a terminal can show."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None], end_ids: Collection[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.end_ids, self.text = show, end_ids, ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token at a time."""
        if self.next_tokens_are_prompt or value.flatten().tolist()[-1] not in self.end_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Shows a piece."""
        self.text += text
        self.show("\n".join(readable(line) for line in text.split("\n")))


def load_speakers(
    subject: Subject, teacher: str | None = None, with_teacher: bool = True, system: str | None = None
) -> list[Speaker]:
    """Loads the student and its teacher.

    Args:
        subject: The student.
        teacher: Source of the teacher; None is the one that is recorded.
        with_teacher: Whether the teacher is loaded.
        system: System message of the conversations; None is that of the student's training, an empty one is none.

    Returns:
        The student and, if it is known and can be loaded, the teacher.

    Raises:
        DistillKitError: If the student, or a teacher that the caller names, can't be loaded.
    """
    settings = {"source": teacher} if teacher is not None else subject.teacher if with_teacher else None
    student = _load_student(subject, settings)
    speakers = [student]
    if settings is not None:
        try:
            speakers.append(_load_teacher(settings, student))
        except DistillKitError as error:
            if teacher is not None:
                raise
            _log.warning("Without the teacher: %s Name another with --teacher.", error)
    for speaker in speakers:
        speaker.start(subject.system if system is None else system)
    return speakers


def _load_student(subject: Subject, teacher: Mapping[str, Any] | None) -> Speaker:
    device = default_device()
    if subject.source is not None:
        tokenizer, model = load_tokenizer(subject.source), load_model(subject.source, _dtype(device))
    else:
        assert subject.checkpoint is not None
        saved = Checkpoint.read(subject.checkpoint)
        spec = saved.setting(_MODEL, "student")
        template = load_tokenizer(**_source_arguments(teacher)) if spec.chat_template == TEACHER and teacher else None
        tokenizer, model = spec.tokenizer(template), saved.load_student(spec)
    return _speaker("student", str(subject), model, tokenizer, subject.uses_template)


def _load_teacher(settings: Mapping[str, Any], student: Speaker) -> Speaker:
    arguments = _source_arguments(settings)
    tokenizer = load_tokenizer(**arguments)
    if tokenizer.get_vocab() == student.tokenizer.get_vocab():  # its prompts in the training were the student's
        tokenizer = student.tokenizer
    model = load_model(arguments["source"], _dtype(default_device()), options=arguments["options"])
    return _speaker("teacher", arguments["source"], model, tokenizer, student.uses_template)


def _speaker(name: str, origin: str, model: nn.Module, tokenizer: Tokenizer, uses_template: bool) -> Speaker:
    model = for_inference(model, default_device(), origin)
    return Speaker(name, origin, model, tokenizer, uses_template and bool(tokenizer.chat_template))


def _source_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    options = SourceOptions(settings.get("revision"), bool(settings.get("trust_remote_code")))
    return {"source": settings["source"], "options": options}


def _dtype(device: torch.device) -> Dtype:
    dtypes: dict[bool, Literal["float32", "bfloat16"]] = {True: "float32", False: "bfloat16"}
    return dtypes[device.type == "cpu"]
