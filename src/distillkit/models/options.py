"""Options with which a model's source is read, under the names that transformers has for them."""

from dataclasses import dataclass

from distillkit.remote import consent


@dataclass(frozen=True)
class SourceOptions:
    """Options of everything that is read from a source: config, weights, tokenizer and generation config.

    Args:
        revision: Branch, tag or commit of a hub id; None is its main branch.
        trust_remote_code: Whether Python code that comes with the model may run: only with the permission
            `remote_code` of the user's environment. Without it, such a model is refused; nothing ever asks on standard
            input.

    Raises:
        ConfigError: If `trust_remote_code` is true and the user's environment does not permit it.
    """

    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            consent.require("remote_code", "trust_remote_code runs Python code that comes with the model")

    def as_arguments(self) -> dict[str, object]:
        """Arguments of transformers' `from_pretrained`."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}


DEFAULT = SourceOptions()
