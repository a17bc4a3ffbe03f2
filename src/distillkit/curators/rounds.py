"""How long a round of responses lasts."""

from distillkit.errors import ConfigError

Rounds = str | dict[str, int]


def parse_rounds(name: str, rounds: Rounds) -> str | int:
    """`once`, `epoch`, or a number of optimizer steps.

    Args:
        name: What the error calls the setting.
        rounds: `once`, `epoch`, `step`, or `{every: n}` with n optimizer steps.

    Raises:
        ConfigError: If it is none of these.
    """
    if rounds in ("once", "epoch"):
        return str(rounds)
    if rounds == "step":
        return 1
    if isinstance(rounds, dict) and rounds.keys() == {"every"} and rounds["every"] >= 1:
        return rounds["every"]
    raise ConfigError(
        f"{name}.rounds must be once, epoch, step or {{every: n}} with n optimizer steps, got {rounds!r}."
    )
