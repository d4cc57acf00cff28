"""How large a regular expression of a JSON Schema becomes when it is compiled. Torch-free."""

from __future__ import annotations

MAX_PATTERN_CHARS = 1000
MAX_PATTERN_DEPTH = 50
MAX_PATTERN_SIZE = 2000
"""Of all patterns of a schema together: repetitions are written out, which takes a second for some thousands."""


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern is not compiled whatever it means; None where nothing speaks against it."""
    if len(pattern) > MAX_PATTERN_CHARS:
        return f"a pattern of more than {MAX_PATTERN_CHARS} characters"
    depth = most = 0
    for char in _without_escapes(pattern):
        depth += (char == "(") - (char == ")")
        most = max(most, depth)
    return f"a pattern nested more than {MAX_PATTERN_DEPTH} levels deep" if most > MAX_PATTERN_DEPTH else None


def pattern_size(pattern: str) -> int:
    """Characters to match, of bounded repetitions each; at least 0, for a malformed pattern whatever comes of it."""
    sizes, last = [0], 0  # of the groups that are open; of what a repetition would repeat
    chars = _without_escapes(pattern)
    at = 0
    while at < len(chars):
        char = chars[at]
        if char == "(":
            sizes.append(0)
            last = 0
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif char == "{":
            bounds, _, _ = chars[at + 1 :].partition("}")
            most = max((int(bound) for bound in bounds.split(",") if bound.isdecimal()), default=1)
            sizes[-1] += last * (max(most, 1) - 1)
            last *= max(most, 1)
            at += len(bounds) + 1
        elif char not in "*+?":
            last = int(char not in "|^$")
            sizes[-1] += last
        at += 1
    return sum(sizes)


def _without_escapes(pattern: str) -> str:
    """The pattern with one letter for each escape and each class of characters."""
    chars, at = [], 0
    while at < len(pattern):
        if pattern[at] == "\\":
            chars.append("x")
            at += 2
        elif pattern[at] == "[":
            at = _end_of_class(pattern, at)
            chars.append("x")
        else:
            chars.append(pattern[at])
            at += 1
    return "".join(chars)


def _end_of_class(pattern: str, at: int) -> int:
    """The place after the class that begins at ``at``."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 1 + (pattern[at] == "\\")
    return at + 1
