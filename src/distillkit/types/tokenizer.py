"""The tokenizer protocol: the methods and attributes of transformers tokenizers that are used."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A transformers tokenizer, or any object with the same methods and attributes."""

    name_or_path: str
    chat_template: str | None
    pad_token: str | None
    pad_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    all_special_tokens: list[str]
    special_tokens_map: Mapping[str, object]

    def __len__(self) -> int:
        """Returns the number of tokens, including added ones."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenizes texts."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Returns the id of each token string."""
        ...

    def get_added_vocab(self) -> Mapping[str, int]:
        """Returns the id of each added token, special or not: text never yields it in pieces."""
        ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Returns the text of token ids."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **kwargs: Any) -> Any:
        """Renders a conversation with the chat template."""
        ...

    def add_special_tokens(self, special_tokens_dict: Mapping[str, object]) -> int:
        """Adds special tokens and returns the number of new ones."""
        ...

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> Any:
        """Writes the tokenizer's files into a folder."""
        ...
