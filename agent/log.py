"""Logs: structured lines on stderr, for a person on a terminal and JSON for everything else.

Cookies and domain XML are never passed to a logger.
"""

import logging
import sys
from typing import Any, Literal

import structlog

LogLevel = Literal["debug", "info", "warning", "error"]


def set_up_logging(level: LogLevel = "info") -> None:
    """Once, at the start of a daemon. `level` is the lowest that is written."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What libraries (grpc, asyncio) have to say; warnings at least, as they are chatty.
    logging.basicConfig(stream=sys.stderr, level=max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
