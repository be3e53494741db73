r"""Globs on file names, as Hadoop and Spark read them.

Belongs here: the translation of a glob into a regular expression, and what is no glob. Does not belong here: which
options take globs (`catalog.py`), matching listings (`autoloader/discovery.py`), Dagster.

`*` is any text, `?` one character, `[a-c]` one of a class (`[!a]` or `[^a]` one of all others), `{a,b}` one of several,
`\` takes the next character as it is.
"""

from __future__ import annotations

#: What means something in a regular expression of Python or Rust, in a class or outside of it.
_SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~")


def name_pattern(glob: str) -> str:
    """The regular expression (of Python's and Rust's common syntax) that a whole file name must match.

    Raises:
        ValueError: If it is no glob on names: empty, with a `/`, or with a bracket, brace or escape left open.
    """
    if not glob or "/" in glob:
        raise ValueError("it matches names, so it is not empty and holds no '/'")
    pattern, depth, position = "", 0, 0
    while position < len(glob):
        char = glob[position]
        position += 1
        if char == "\\":
            if position == len(glob):
                raise ValueError("nothing stands behind its last '\\'")
            pattern += _literal(glob[position])
            position += 1
        elif char == "[":
            part, position = _character_class(glob, position)
            pattern += part
        elif char == "{":
            depth += 1
            pattern += "(?:"
        elif char == "}" and depth:
            depth -= 1
            pattern += ")"
        elif char == "," and depth:
            pattern += "|"
        else:
            pattern += {"*": ".*", "?": "."}.get(char) or _literal(char)
    if depth:
        raise ValueError("a '{' is not closed")
    return f"(?s)^(?:{pattern})$"


def _character_class(glob: str, position: int) -> tuple[str, int]:
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    members: list[str] = []
    while position < len(glob):
        char = glob[position]
        position += 1
        if char == "]" and members:
            return f"[{'^' if negated else ''}{''.join(members)}]", position
        first = char
        if glob[position : position + 1] == "-" and glob[position + 1 : position + 2] not in ("", "]"):
            last = glob[position + 1]
            if last < first:
                raise ValueError(f"the range {first}-{last} is empty")
            members.append(f"{_literal(first)}-{_literal(last)}")
            position += 2
        else:
            members.append(_literal(first))
    raise ValueError("a '[' is not closed")


def _literal(char: str) -> str:
    return f"\\{char}" if char in _SPECIAL else char
