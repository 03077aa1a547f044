"""Structured logs of a server process: to stderr, JSON unless a person reads them."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog

from kvstore.env import Log

FORMATS = ("auto", "json", "console")
LEVELS = ("debug", "info", "warning", "error")


class LossyStream:
    """A stream of which nobody hears that it failed: a log line that cannot be written (its disk is full, the reader
    of its pipe has gone) is lost. What a node does must not depend on it, least of all what it does about that disk.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


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
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, LossyStream(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger(node=node)
    return log
