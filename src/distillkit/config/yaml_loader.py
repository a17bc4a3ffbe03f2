"""YAML of configuration files: YAML 1.2 numbers, no key twice, and `${config_dir}` as the file's folder."""

import re
from pathlib import Path

import yaml

_CONFIG_DIR = "${config_dir}"
_PLACEHOLDER = "__distillkit_config_dir__"
"""Stands for `${config_dir}` while YAML is parsed, to which its braces and a folder named `a #b` have a meaning."""

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I
)


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number and a date as text, as the command line does; refuses empty and repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys: list[object] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key is None or key in keys:
                problem = "an empty key" if key is None else f"the key {key!r} a second time"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            keys.append(key)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z", re.I), list("-+.0123456789")
)


def parse(text: str, folder: Path) -> object:
    """Parses the text of a configuration file.

    Args:
        text: The YAML document.
        folder: Value of `${config_dir}`.

    Raises:
        ValueError: If the text is not valid YAML; the message names the line.
    """
    try:
        return _insert_folder(yaml.load(text.replace(_CONFIG_DIR, _PLACEHOLDER), _Loader), str(folder))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        location = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = f"{error.context or ''} {error.problem or ''}".strip().replace(_PLACEHOLDER, _CONFIG_DIR)
        raise ValueError(f"{location}{problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or an anchor contains itself") from error


def _insert_folder(value: object, folder: str) -> object:
    """A copy of parsed YAML with the folder in place of the placeholder."""
    if isinstance(value, dict):
        return {_insert_folder(key, folder): _insert_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_insert_folder(item, folder) for item in value]
    return value.replace(_PLACEHOLDER, folder) if isinstance(value, str) else value
