"""Trl's distillation trainers in the step's benchmark: what is theirs, and what had to be overridden."""

from typing import Any

from torch import Tensor

from steps.clock import StepClock
from steps.workload import ADAMW, Setup, examples, load_model, load_tokenizer


def gkd(setup: Setup, clock: StepClock, use_liger_kernel: bool = False) -> None:
    """GKDTrainer on given responses: `lmbda=0` draws none, `beta=0` is KL(p‖q).

    Its own collator takes token ids with a completion mask, so nothing is tokenised within the step. Its loss is
    divided by the number of response tokens of the batch, as ours is. Overridden is what `_clocked` says.

    Args:
        setup: What is run.
        clock: What it is measured with.
        use_liger_kernel: Whether transformers puts Liger's kernels into the student's layers.
    """
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        {
            "prompt": "",  # the collator asks for it and does not read it where there is a mask
            "input_ids": row.prompt + row.response,
            "completion_mask": [0] * len(row.prompt) + [1] * len(row.response),
        }
        for row in examples(setup)
    ]
    trainer = _clocked(GKDTrainer, clock)(
        model=load_model(setup, "student"),
        teacher_model=load_model(setup, "teacher"),
        args=GKDConfig(
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            seq_kd=False,
            max_length=None,
            train_sampling_strategy="sequential",
            use_liger_kernel=use_liger_kernel,
            **_arguments(setup),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(setup),
    )
    trainer.train()


def distillation(setup: Setup, clock: StepClock) -> None:
    """DistillationTrainer on given responses; it knows only its student's own.

    Two methods are overridden, and what `_clocked` says. A prompt of the data set holds its response along with it:
    `_tokenize_prompts` takes the two apart instead of tokenising, `_generate_single_turn` returns the response instead
    of drawing one. Padding, scoring, the chunked loss, backward and optimizer are its own.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenResponses(_clocked(DistillationTrainer, clock)):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [prompt for prompt, _ in prompts], None, {"responses": [response for _, response in prompts]}

        def _generate_single_turn(
            self, prompt_ids: Any, images: Any, multimodal_fields: dict[str, Any], **_: Any
        ) -> list[list[int]]:
            return multimodal_fields["responses"]

    rows = examples(setup)
    trainer = GivenResponses(
        model=load_model(setup, "student"),
        teacher_model=load_model(setup, "teacher"),
        args=DistillationConfig(
            beta=0.0,
            temperature=1.0,
            max_completion_length=max(len(row.response) for row in rows),
            shuffle_dataset=False,
            **_arguments(setup),
        ),
        train_dataset=Dataset.from_list([{"prompt": [row.prompt, row.response]} for row in rows]),
        processing_class=load_tokenizer(setup),
    )
    trainer.train()


def _arguments(setup: Setup) -> dict[str, Any]:
    """Settings of both trl trainers; nothing is logged, saved, checkpointed or clipped."""
    beta1, beta2 = ADAMW["betas"]
    return {
        "output_dir": setup.path("trl"),
        "per_device_train_batch_size": setup.rows // setup.micro_batches,
        "gradient_accumulation_steps": setup.micro_batches,
        "max_steps": setup.steps,
        "optim": "adamw_torch_fused",
        "learning_rate": ADAMW["lr"],
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": ADAMW["eps"],
        "weight_decay": ADAMW["weight_decay"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": setup.mixed,
        "use_cpu": setup.device == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": setup.device != "cpu",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _clocked(trainer: type, clock: StepClock) -> Any:
    """A trainer of trl that tells the clock.

    Overridden for the clock are the places where a step begins and ends, and nothing else of them. The norm of the
    gradients is not computed: transformers does so in each step, for its log, even where nothing is clipped.
    """
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.loss = 0.0  # the sum over the step's micro-batches
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(self.loss)

    class Clocked(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._ends = Ends()
            super().__init__(*args, callbacks=[self._ends], **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self._ends.loss = self._ends.loss + loss.detach()
            return loss

        def _get_grad_norm(self, *_: Any, **__: Any) -> None:
            return None

    return Clocked
