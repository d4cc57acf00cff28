"""Processes that tests start by the dozen and kill.

Forked from a server that has imported the large packages. There is one such server for a test run, and it starts with
what it was told before its first process: so one list, here.
"""

from __future__ import annotations

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "evospec.adapters.alignment.worker",
        "evospec.engine.online.token_log",
        "evospec.engine.online.weight_channel",
        "pytest",
        "hypothesis",
    ]
)
