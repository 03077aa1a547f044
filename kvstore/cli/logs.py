"""Structured logs of a server process: to stderr, JSON unless a person reads them."""

from __future__ import annotations

import logging
import sys

import structlog

from kvstore.env import Log

FORMATS = ("auto", "json", "console")
LEVELS = ("debug", "info", "warning", "error")


def server_log(node: str, log_format: str, level: str) -> Log:
    """A log whose every line names the node. `auto` is `console` on a terminal, else `json`."""
    is_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor
    if log_format == "json" or (log_format == "auto" and not is_terminal):
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=is_terminal, pad_event_to=24)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger(node=node)
    return log
