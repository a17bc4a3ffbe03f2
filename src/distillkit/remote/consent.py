"""Consent of the user: what a shared configuration or model may not do unless the user's environment permits it.

A configuration, a checkpoint or a model folder may come from somebody else. The switches for what they could do to the
user (run code, read a secret) are therefore not settings, which the same file could set: they are names in an
environment variable.
"""

import os

from distillkit.errors import ConfigError

VARIABLE = "DISTILLKIT_ALLOW"
"""Environment variable with the permissions, separated by commas."""


def is_allowed(permission: str) -> bool:
    """Whether the user's environment contains `permission`."""
    return permission in {name.strip() for name in os.environ.get(VARIABLE, "").split(",")}


def require(permission: str, reason: str) -> None:
    """Checks that the user permits something.

    Args:
        permission: Name of the permission, such as `remote_code`.
        reason: Who asks for what, as the beginning of a sentence.

    Raises:
        ConfigError: If the environment does not contain the permission.
    """
    if not is_allowed(permission):
        raise ConfigError(
            f"{reason}. A shared file could ask for this too, so it needs your consent: if you trust it, set the "
            f"environment variable {VARIABLE}={permission} (several are separated by commas)."
        )
