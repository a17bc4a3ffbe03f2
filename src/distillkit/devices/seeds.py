"""The seed of a run, from which all others are derived unless they are set."""

import os

from distillkit.errors import ConfigError

_VARIABLE = "PL_GLOBAL_SEED"
"""Environment variable in which Lightning's `seed_everything` leaves its seed, for all processes of a run."""


def resolve_seed(seed: int | None) -> int:
    """Returns a seed, or the run's.

    Args:
        seed: The seed that is set for a part; None is the seed of the run, `seed_everything`, or 0 if it has none.

    Raises:
        ConfigError: If the seed in the environment is not a number.
    """
    if seed is not None:
        return seed
    text = os.environ.get(_VARIABLE, "0")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"The environment variable {_VARIABLE} must be a whole number, got {text!r}.") from None
