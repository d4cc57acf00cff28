"""The ``evospec`` command in this process, which has loaded already what it would load."""

from __future__ import annotations

import os
import runpy
import signal
import sys

import pytest

from evospec.server import cli
from tests.running_server import EVOSPEC


def run_evospec(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit status of ``evospec`` with these arguments, and of the program that it becomes."""

    def become(_: str, command: list[str]) -> None:
        assert command[:2] == [sys.executable, "-m"]
        monkeypatch.setattr(sys, "argv", command[2:])
        monkeypatch.delitem(sys.modules, command[2], raising=False)
        runpy.run_module(command[2], run_name="__main__")

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [EVOSPEC, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code
