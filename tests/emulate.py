"""Runs a program on an emulated CUDA device: ``python -m tests.emulate MODULE ARGUMENTS``."""

from __future__ import annotations

import runpy
import sys

from tests.emulated_engine import install

if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__")
