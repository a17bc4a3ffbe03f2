"""Error messages of the configuration parser as one line: the file, the key as users write it, and a suggestion."""

import difflib
import inspect
import pydoc
import re
from dataclasses import dataclass

from distillkit.config.command import Command

_KEY = re.compile(r"Parser key \"(?P<name>[^\"]+)\":")
_CLASS = re.compile(r"Problem with given class_path '(?P<name>[\w.]+)':")
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept|Subcommand '\w+' does not accept|^) ?[oO]ption '(?P<option>[\w.]+)'"
    r"|Key '(?P<key>[\w.]+)' is not expected|unrecognized arguments: --(?P<flag>[\w.]+)"
)
_HELP = re.compile(r"(?P<key>[\w.]+)\.help: Expected a dot import path string: (?P<name>.*)")
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.*)")
_TYPE = re.compile(
    r"(?:Expected an?|Unexpected) (?:<class '(?:\w+\.)*(?P<name>\w+)'>|typing\.Literal\[(?P<choices>[^\]]*)\]"
    r"|(?P<text>[^.:]*?)(?=, but got |[.:]|$))"
)
_FACTORY = re.compile(
    r"Type typing\.Callable.* expects a function or a callable class: (?P<reason>.*?)\.*(?: Got value: (?P<value>.*))?$"
)
_FACTORY_KEY = re.compile(
    r"Type typing\.Callable.* expects a function or a callable class: Parser key \"(?P<name>[^\"]+)\":$"
)
_CLASS_PATH = re.compile(r"class_path='(?P<name>[\w.]+)'")
_TYPE_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "a mapping",
    "dot import path string": "the name of a part",
    "import path format": "the name of a part",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "str": "a text",
}
_VALUE = re.compile(
    r"(?:Got value|Given value|dot import path string|import path format): (?P<value>(?!NestedArg).*?)"
    r"(?:\. Got value: .*)?$",
    re.MULTILINE,
)
_NO_TEXT = re.compile(r"True|False|-?(inf|nan|[\d.]+(e[+-]?\d+)?)|datetime\..*")
"""Values that YAML makes of unquoted texts such as `no`, `12e4567` and `2024-06-01`."""
_NOISE = re.compile(
    r"Does not validate|Subtypes: |Errors:$|Given value|Subclass types expect|a class path \(str\)|a dict with"
    r"|Expected a path but"
)


@dataclass(frozen=True)
class _Problem:
    """One problem in a message of the parser.

    Args:
        keys: The keys that lead to the value.
        class_path: The innermost class whose constructor refuses it; empty if there is none.
        reason: The parser's words.
    """

    keys: tuple[str, ...]
    class_path: str
    reason: str


def explain(message: str, command: Command) -> str:
    """Returns jsonargparse's error message as one line: where the key was set, its full path, and the reason.

    Args:
        message: Error message of jsonargparse. Its lines form a tree by indentation, with a branch for each type that a
            value may have; the deepest leaves are the reason.
        command: The command that was refused.
    """
    help_key = _HELP.search(message)
    if help_key is not None:
        key, name = help_key["key"], help_key["name"]
        return f"{key} takes no class named {name!r}. `--help.{key.partition('.')[0]}` lists those that it takes."
    required = _REQUIRED.search(message)
    if required is not None:
        keys = re.sub(r"\b\w+\.(?=(model|data|trainer)\b)", "", required["keys"])  # the verb is not a key
        parents = [".".join(problem.keys) for problem in _problems(message) if _REQUIRED.search(problem.reason)]
        if any(parents):
            keys = ", ".join(f"{parents[0]}.{key}" for key in keys.split(", "))
            origin = command.origin(parents[0])
            keys = f"{origin}: {keys}" if origin else keys
        return f"{keys} must be set, in a config file or on the command line."
    problems = _problems(message)
    deepest = max(len(problem.keys) for problem in problems)
    problems = [problem for problem in problems if len(problem.keys) == deepest]
    for problem in problems:
        match = _UNKNOWN.search(problem.reason)
        if match is not None:
            return _unknown(problem, match, command)
    path, text = ".".join(problems[0].keys), _refusal([problem.reason for problem in problems], message)
    return f"{command.located(path)} {text}" if path else text


def _problems(message: str) -> list[_Problem]:
    """The leaves of the tree that a message describes."""
    branches: list[tuple[int, str, bool]] = []  # indentation, name, True for a key and False for a class
    problems = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        if not text:
            continue
        indentation = len(line) - len(text)
        while branches and branches[-1][0] >= indentation:
            branches.pop()
        for pattern in (_KEY, _CLASS, _FACTORY_KEY):
            match = pattern.match(text)
            if match is not None:
                branches.append((indentation, match["name"], pattern is not _CLASS))
                text = text[match.end() :].strip()
        if text and not _NOISE.match(text):
            keys = tuple(name for _, name, is_key in branches if is_key)
            class_path = next((name for _, name, is_key in reversed(branches) if not is_key), "")
            factory = _FACTORY.match(text)
            if factory is not None:
                text, named = factory["reason"], _CLASS_PATH.search(factory["value"] or "")
                class_path = named["name"] if named is not None else class_path
            problems.append(_Problem(keys, class_path, text))
    return problems or [_Problem((), "", " ".join(message.split()))]


def _refusal(reasons: list[str], message: str) -> str:
    """The reasons why a value is refused: the types that it may have, and else the parser's words."""
    types, words = [], []
    for reason in reasons:
        match = _TYPE.match(reason)
        if match is None:
            words.append(reason)
        else:
            names = re.findall(r"[^', ]+", match["choices"] or "") or [match["name"] or match["text"]]
            types += [_TYPE_NAMES.get(name, name) for name in names]
    expected = f"must be {' or '.join(dict.fromkeys(types))}" if types else ""
    if words:
        return "; ".join(dict.fromkeys(filter(None, [expected, *words])))
    values = _VALUE.findall(message)
    if not values:
        return f"{expected}."
    advice = " Put it in quotes." if _TYPE_NAMES["str"] in types and _NO_TEXT.fullmatch(values[0]) else ""
    return f"{expected}, got {values[0]}.{advice}"


def _unknown(problem: _Problem, match: re.Match[str], command: Command) -> str:
    """The message for a key that no class has."""
    key = next(filter(None, (match["option"], match["key"], match["flag"])))
    if match["group"] is not None:
        key = f"{match['group']}.{key}"
    key = key.replace(".init_args", "")
    path = ".".join((*problem.keys, key))
    origin = command.origin(path)
    prefix = f"{origin}: " if origin else ""
    if path.partition(".")[0] in ("class_path", "init_args"):
        return (
            f"{prefix}this is the file of a part, not of a run. Name it where the part goes, as in --model.loss=FILE."
        )
    if not problem.keys and path.partition(".")[0] not in command.roots:
        path = path.partition(".")[0]
    section, *names_below = path.split(".")
    if section in command.roots and names_below[1:] and names_below[0] not in _settings(section, command):
        path = f"{section}.{names_below[0]}"  # the misspelt key, not the one below it
    parent, _, name = path.rpartition(".")
    names = _settings(problem.class_path or parent, command)
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6) if len(name) > 2 else []
    near += [setting for setting in sorted(names) if len(name) > 2 and setting.startswith(name)]
    hint = f"Did you mean {near[0]}?" if near else "Run with `--print_config` to list every key."
    return f"{prefix}unknown key {path}. {hint}"


def _settings(name: str, command: Command) -> set[str]:
    """The settings of a class, named by its import path or by its top-level key; or the top-level keys."""
    if not name:
        return set(command.roots)
    part = command.roots.get(name) or pydoc.locate(name)
    return set(inspect.signature(part).parameters) if isinstance(part, type) else set()
