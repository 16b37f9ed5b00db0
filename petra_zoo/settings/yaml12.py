"""YAML whose numbers are those of YAML 1.2, as people write them: 1e-8 is a number, and 010 is ten.

PyYAML speaks YAML 1.1, where 1e-8 is text, 010 is eight, 1:30 is ninety and 2026-01-01 a date. Both words for truth
are understood, 1.2's and 1.1's.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import yaml

from petra_zoo.strict_json import Json

_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
# The core schema, section 10.3.2 of the specification, and the characters that such text begins with.
_NUMBERS = (
    (_INT, re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Json]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:  # PyYAML lets the last one win, and YAML forbids it
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that is a number to YAML 1.1 or to 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _NUMBERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list(_first))
_Loader.add_constructor(_INT, _Loader.construct_whole_number)


def read_yaml(text: str) -> Json:
    """What the text says, as plain Python values.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # of a value that is not what its tag says, such as !!int x
        raise yaml.YAMLError(str(error)) from error


def write_yaml(value: Json) -> str:
    """YAML that readers of 1.1 and of 1.2 understand alike; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
