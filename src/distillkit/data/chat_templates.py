"""Chat templates: ready ones, those of a file, their arguments, and a fixed date for those that print one.

Whatever is set becomes part of the template's text. So it is part of every fingerprint of the tokenizer, and an export
renders conversations as the run did.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from distillkit.errors import ConfigError
from distillkit.types import Tokenizer

TEACHER = "teacher"
"""The value of `chat_template` that stands for the teacher's template."""

_FOLDER = Path(__file__).parent / "jinja"
_MARKS = re.compile(r"<[|｜][^|｜\s]+[|｜]>|<(?:start|end)_of_turn>")
_RESERVED = (
    *("messages", "add_generation_prompt", "continue_final_message", "tokenize", "tools", "documents"),
    *("strftime_now", "raise_exception", *DEFAULT_NAMESPACE),
)
"""Variables that transformers or Jinja sets, so that another default would have no effect."""


def ready_templates() -> list[str]:
    """Names of the ready templates, each of which only appends: any turn of a conversation can be trained on."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def check_template(name: str, template: str | None, arguments: Mapping[str, object] | None) -> None:
    """Checks the settings of a template, before any tokenizer is loaded.

    Args:
        name: Class whose settings they are, for errors.
        template: Name of a ready template, `teacher`, or path of a Jinja file; None is the tokenizer's template.
        arguments: Values for variables of the template; None has none.

    Raises:
        ConfigError: If there is no such template or file, or an argument's name or value can't be one of a template.
    """
    if template is not None and template != TEACHER and template not in ready_templates() and not _file(template):
        raise ConfigError(
            f"{name}.chat_template must be a Jinja file, {TEACHER} or one of {', '.join(ready_templates())}, got "
            f"{template!r}, which is no file."
        )
    for key, value in (arguments or {}).items():
        if not key.isidentifier() or key in _RESERVED:
            raise ConfigError(
                f"{name}.template_kwargs can't set {key!r}: name a variable of the chat template that transformers "
                "does not set itself."
            )
        _literal(value, f"{name}.template_kwargs.{key}")


def settings_identity(template: str | None, arguments: Mapping[str, object] | None) -> str:
    """A text that differs between any two settings of a template; a file counts by its content.

    Args:
        template: As in `check_template`.
        arguments: As in `check_template`.
    """
    content = Path(template).expanduser().read_text(encoding="utf-8") if template and _file(template) else template
    return json.dumps([content, arguments], sort_keys=True)


def read_template(template: str, tokenizer: Tokenizer) -> str:
    """The text of a ready template or of a Jinja file, for a tokenizer.

    A ready template begins with the tokenizer's first token if the tokenizer puts one before a text.

    Args:
        template: Name of a ready template, or path of a Jinja file.
        tokenizer: A transformers tokenizer.

    Raises:
        ConfigError: If a ready template's tokens are not tokens of this tokenizer, or the file can't be read.
    """
    if template not in ready_templates():
        try:
            return Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {template} can't be read ({error}). Name a Jinja file.") from error
    text = (_FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    vocabulary = tokenizer.get_vocab()
    missing = sorted(mark for mark in set(_MARKS.findall(text)) if mark not in vocabulary)
    if missing:
        raise ConfigError(
            f"chat_template: {template} writes {', '.join(missing)}, which {tokenizer.name_or_path} has no token for. "
            "Use plain, which suits any tokenizer, or another of the ready templates."
        )
    first = tuple(tokenizer("a", verbose=False)["input_ids"])[:1]
    starts = tokenizer.bos_token_id is not None and first == (tokenizer.bos_token_id,)
    return ("{{ bos_token }}" if starts else "") + text


def with_arguments(template: str, arguments: Mapping[str, object]) -> str:
    """The template with other defaults for some of its variables.

    Args:
        template: Text of a Jinja template.
        arguments: Values by the variables' names, such as `{"enable_thinking": False}`.

    Raises:
        ConfigError: If the template has no such variable.
    """
    unknown = sorted(set(arguments) - _variables(template))
    if unknown:
        names = ", ".join(sorted(_variables(template) - set(_RESERVED))) or "none"
        raise ConfigError(f"template_kwargs: the chat template has no variable {unknown[0]}. It has: {names}.")
    defaults = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value, name)} %}}{{% endif %}}"
        for name, value in arguments.items()
    )
    # transformers removes a line break after a block, so this one protects a line break of the template.
    return "".join(defaults) + "\n" + template if arguments else template


def prints_date(template: str | None) -> bool:
    """True if a template prints the current date, which would give a prompt other tokens every day."""
    return isinstance(template, str) and "strftime_now" in template


def with_date(template: str, day: date) -> str:
    """The template with a fixed date instead of the current one: a macro in place of transformers' `strftime_now`."""
    directives = [f"%{letter}" for letter in "aAbBcdDeFgGhHIjmMpRSTuUVwWxXyYzZ"]
    directives += [f"%-{letter}" for letter in "dHIjmMSUwWy"]
    values = {directive: day.strftime(directive) for directive in directives} | {"%%": "%"}
    filters = "".join(f" | replace({json.dumps(key)}, {json.dumps(value)})" for key, value in values.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _file(template: str) -> bool:
    return Path(template).expanduser().is_file()


class _Generation(Extension):
    """transformers' `{% generation %}` block."""

    tags = {"generation"}  # noqa: RUF012  an instance variable in jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parses the content of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _variables(template: str) -> set[str]:
    """Names that a template reads without having set them first."""
    try:
        parsed = Environment(extensions=[_Generation, loopcontrols], autoescape=False).parse(template)
    except TemplateError as error:
        raise ConfigError(f"The chat template is not valid Jinja ({error}): correct it.") from error
    return meta.find_undeclared_variables(parsed)


def _literal(value: object, name: str) -> str:
    """A value as Jinja writes it.

    Raises:
        ConfigError: If it is of another type than a text, a number, a truth value, None, or lists and mappings of them.
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item, name) for item in value) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(str(key))}: {_literal(item, name)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    raise ConfigError(f"{name} must be a text, a number, true, false or null, got a {type(value).__name__}.")
