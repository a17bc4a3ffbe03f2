"""Help that lists every key of a verb, made from the signatures and docstrings of the constructors."""

import pydoc
import re
import sys
from argparse import Action
from collections.abc import Sequence

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from distillkit import registry

_CLASSES = re.compile(r"(, known subclasses: )((?:[\w.]+, )*[\w.]+)")


class PublicPartsFormatter(DefaultHelpFormatter):  # type: ignore[misc]  # jsonargparse has no types
    """Help in which the classes that a key takes are those that users may name."""

    def _get_help_string(self, action: Action) -> str:
        text: str = super()._get_help_string(action)
        return _CLASSES.sub(lambda match: match[1] + ", ".join(filter(_is_public, match[2].split(", "))), text)


def print_full_help(parser: ArgumentParser, verb: str, arguments: Sequence[str]) -> None:
    """Prints the help that a command asks for by `--help`, or by `--help.model` for one section of the keys; then ends.

    Args:
        parser: The verb's parser, which is used up.
        verb: Name of the verb.
        arguments: The command's arguments. If they ask for no help, nothing happens.

    Raises:
        SystemExit: After help.
    """
    topic = next((argument for argument in arguments if argument == "--help" or argument.startswith("--help.")), None)
    if topic is None:
        return
    parser.usage = f"distillkit {verb} [--config FILE] [--KEY VALUE ...]"
    section = topic.removeprefix("--help").removeprefix(".")
    if section:
        parser.description = None
        for group in parser._action_groups:
            group._group_actions = [action for action in group._group_actions if action.dest.split(".")[0] == section]
    parser.print_help()
    sys.exit(0)


def _is_public(path: str) -> bool:
    """True for a class that users may name: an installed part, or one of a package's public names that is no part."""
    package, _, name = path.rpartition(".")
    if package.partition(".")[0] != "distillkit" or registry.find(name):
        return True
    part = pydoc.locate(path)
    return package.count(".") <= 1 and isinstance(part, type) and registry.kind_of(part) is None
