"""Copies of a model that stay as they are."""

import peft
import torch
from torch import nn

from distillkit.models.copies import frozen_copy
from distillkit.models.fingerprint import fingerprint
from distillkit.testing.families import tiny_family
from helpers.models import tiny_model

CPU = torch.device("cpu")


def trained(model: nn.Module) -> nn.Module:
    """The model in training, with gradients."""
    model.train()
    model(input_ids=torch.arange(6)[None]).logits.square().mean().backward()
    return model


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5


def test_a_copy_has_the_weights_and_shares_none() -> None:
    model = trained(tiny_model())
    held = frozen_copy(model, CPU)
    before = fingerprint(model)
    assert fingerprint(held) == before
    moved(model)
    assert fingerprint(held) == before != fingerprint(model)


def test_a_copy_has_no_gradients_and_leaves_the_models() -> None:
    model = trained(tiny_model())
    held = frozen_copy(model, CPU)
    assert not held.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in held.parameters())
    assert model.training
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_tied_in_the_copy() -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    held = frozen_copy(model, CPU)
    assert held.lm_head.weight is held.model.embed_tokens.weight


def test_an_earlier_copy_gives_its_memory() -> None:
    model = trained(tiny_model())
    held = frozen_copy(model, CPU)
    places = [parameter.data_ptr() for parameter in held.parameters()]
    moved(model)
    assert frozen_copy(model, CPU, held) is held
    assert fingerprint(held) == fingerprint(model)
    assert [parameter.data_ptr() for parameter in held.parameters()] == places


def test_an_adapter_is_copied_with_its_model() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config)
    held = frozen_copy(model, CPU)
    ids = torch.arange(6)[None]
    assert torch.equal(held(input_ids=ids).logits, model(input_ids=ids).logits)
    moved(model)
    frozen_copy(model, CPU, held)
    assert torch.equal(held(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_that_keeps_a_state_of_its_last_training_pass_is_copied() -> None:
    model = trained(tiny_family("recurrent_gemma"))
    held, states = frozen_copy(model, CPU), [module.recurrent_states for module in recurrent(model)]
    assert states
    assert all(state.grad_fn is not None for state in states)
    assert all(
        torch.equal(module.recurrent_states, state) for module, state in zip(recurrent(held), states, strict=True)
    )
    assert all(not module.recurrent_states.requires_grad for module in recurrent(held))


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "recurrent_states", None) is not None]
