"""Something else that happens between any two lines of the code under test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def before_each_line(folder: str, action: Callable[[], object], function: Callable[[], T]) -> T:
    """Run ``function``, and ``action`` before each line that it executes in files under ``folder``."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if folder not in frame.f_code.co_filename:
            return None
        if event == "line":
            action()  # not traced itself
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(previous)


def at_line(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """``action``, but only at the ``number``-th call (from 0)."""
    calls = iter(range(number + 1))

    def act() -> None:
        if next(calls, None) == number:
            action()

    return act


def count_lines(folder: str, function: Callable[[], object]) -> int:
    """How many lines under ``folder`` a call executes."""
    lines: list[None] = []
    before_each_line(folder, lambda: lines.append(None), function)
    return len(lines)
