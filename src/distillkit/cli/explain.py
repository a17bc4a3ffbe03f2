"""Turns a parser's complaint into one line that says where the fault is and what may have been meant."""

import difflib
import inspect
import re
from dataclasses import dataclass, field

from distillkit.cli.configs import Config, path_of

_REFUSED = re.compile(
    r"[Oo]ption '(?P<option>[\w.]+)'(?: is not accepted|$)|'?(?P<key>[\w.]+)'? is not expected"
    r"|unrecognized arguments: (?P<rest>--.*)"
)


@dataclass
class Command:
    """What the user asked for.

    Args:
        config: The merged config files.
        arguments: The other command-line arguments.
        classes: Classes whose settings it may contain.
    """

    config: Config = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)


def explain(message: str, command: Command) -> str:
    """One line of jsonargparse's message.

    Args:
        message: What jsonargparse says; it may name a nested key without its place, and be many lines long.
        command: What the user asked for.
    """
    text = re.sub(r"\S*merged\.yaml", "the config", " ".join(message.split()))
    text = re.sub(r"required: \w+\.(?=(model|data|trainer)\b)", "required: ", text)  # the verb is no key
    text = re.split(r" Subclass types expect one of:| Given value type:", text)[0]
    refused = _REFUSED.search(text)
    if refused is None:
        return text
    unrecognized = [word[2:].partition("=")[0] for word in refused["rest"].split()] if refused["rest"] else []
    key = unrecognized[0] if unrecognized else _place(refused["option"] or refused["key"], command)
    return f"unknown key {key}.{_suggestion(key.rpartition('.')[2], command)}"


def _place(word: str, command: Command) -> str:
    """Where the key `word` was given, as users write it."""
    name = word.rpartition(".")[2]
    given = [argument[2:].partition("=")[0] for argument in command.arguments if argument.startswith("--")]
    on_command_line = [key.replace(".init_args", "") for key in given if key.rpartition(".")[2] == name]
    return path_of(command.config, name) or (on_command_line or [word])[0]


def _suggestion(name: str, command: Command) -> str:
    """The setting that is spelt most like `name`."""
    settings = {setting for owner in command.classes for setting in inspect.signature(owner).parameters}
    near = difflib.get_close_matches(name, sorted(settings - {name}), n=1, cutoff=0.6) if len(name) > 2 else []
    return f" Did you mean {near[0]}?" if near else " `--print_config` shows every key."
