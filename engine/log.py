"""Structured logs of all processes, on standard error: one JSON object (or one line of text) an event.

Context bound with ``structlog.contextvars`` (request id, tenant) is on every line of its request.
Prompts, outputs and keys are never logged.
"""

from __future__ import annotations

import logging
import os
import sys

import structlog
from structlog.typing import Processor

LEVEL_VARIABLE = "EVOSPEC_LOG__LEVEL"
FORMAT_VARIABLE = "EVOSPEC_LOG__FORMAT"

_SHARED_PROCESSORS: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]


def configure_logging(level: str, format: str) -> None:
    """Send structlog and the standard library's loggers (uvicorn's too) through one formatter.

    ``level`` is "debug", "info", "warning" or "error"; ``format`` is "json" or "console".
    """
    renderer: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if format == "json"
        # Its own way to show exceptions has local variables, which may hold prompts and keys.
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr is not None and sys.stderr.isatty(),  # None: it was closed before the start
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED_PROCESSORS,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # httpx logs every request line at "info"; its callers log what matters.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.configure(
        processors=[*_SHARED_PROCESSORS, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def configure_logging_from_environment() -> None:
    """The same in a child process: the parent passes its choice in the environment."""
    configure_logging(os.environ.get(LEVEL_VARIABLE, "info"), os.environ.get(FORMAT_VARIABLE, "json"))
