"""Checks of the rows that a curator returns, which may be anyone's: what is wrong with them is one line."""

from collections.abc import Sequence

from distillkit.errors import PluginError
from distillkit.interfaces import Curator
from distillkit.types import Prompts, Row


def check_rows(curator: Curator, prompts: Prompts, rows: Sequence[Row]) -> None:
    """Checks that each prompt has equally many rows, side by side, and that each row's mask fits its tokens.

    Args:
        curator: The curator that returned the rows.
        prompts: The prompts of the round, at least one.
        rows: The rows of the round.

    Raises:
        PluginError: If they are of another number, not grouped by prompt, or a mask does not fit.
    """
    name = f"{type(curator).__name__}.curate"
    size, rest = divmod(len(rows), len(prompts))
    if size == 0 or rest:
        raise PluginError(
            f"{name} returned {len(rows)} rows for {len(prompts)} prompts: every prompt needs the same number of rows, "
            "at least one. A row that must not be trained on stays, with a response_mask that is False everywhere."
        )
    for start in range(0, len(rows), size):
        names = {row.prompt_id for row in rows[start : start + size]}
        if len(names) > 1:
            raise PluginError(
                f"{name} returned rows {start} to {start + size - 1} for {len(names)} prompts: the {size} rows of a "
                "prompt must be next to each other, in the order of the prompts."
            )
    for index, row in enumerate(rows):
        if len(row.response_mask) != len(row.input_ids) or row.response_mask[:1] == (True,):
            raise PluginError(
                f"{name} returned row {index} with {len(row.input_ids)} tokens and a response_mask of "
                f"{len(row.response_mask)}: it needs one value per token, and False at the first."
            )
