"""Structured logs: JSON lines on standard output, or columns for people where that is a terminal.

The access log has a way of its own, because it has a line for each request: through structlog's processors a line cost
9 µs of processor time and a system call; encoded by msgspec and written in batches it costs 2 µs. A process that is
killed loses at most the lines of its last tenth of a second.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any, BinaryIO, Final

import msgspec
import structlog
from aiohttp.http import HttpProcessingError
from msgspec import Struct

from services.web.ids import now_ms, timestamp
from services.web.tracing import traceparent

_FLUSH_AFTER_S: Final = 0.1
_LINES_MAX: Final = 256  # some 64 KiB: what a pipe takes at once


def configure_logs(service: str) -> None:
    """Call once, before the first line is logged. `service` is in every line."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        with_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stdout.isatty():
        # Plain tracebacks: the richer ones show local variables, and those hold passwords and tokens.
        console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        structlog.configure(processors=[*shared, console])
    else:
        structlog.configure(
            processors=[*shared, structlog.processors.format_exc_info, _encode],
            logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer),
            cache_logger_on_first_use=True,
        )
    structlog.contextvars.bind_contextvars(service=service)
    root = logging.getLogger()
    root.handlers = [_FromLogging()]
    root.setLevel(logging.WARNING)


class _FromLogging(logging.Handler):
    """What libraries log goes the same way. Bytes that are no HTTP are no error of ours: one short line."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log = structlog.get_logger(record.name)
        if isinstance(error, HttpProcessingError):
            log.info("not http", detail=record.getMessage(), error=str(error)[:200])
        else:
            log.log(record.levelno, record.getMessage(), exc_info=error)


def with_trace(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A processor: every line says which trace it belongs to."""
    trace = traceparent()
    if trace:
        event.setdefault("traceparent", trace)
    return event


def _encode(logger: Any, method: str, event: structlog.typing.EventDict) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


class AccessLine(Struct, frozen=True, gc=False):
    """One request, in the same shape as every other line of the log."""

    method: str
    path: str
    status: int
    duration_ms: float
    request_id: str
    user: int | None
    service: str
    timestamp: str
    traceparent: str
    event: str = "request"
    level: str = "info"


class AccessLog:
    """Writes a line for each request. Belongs to one event loop."""

    def __init__(self, service: str, stream: BinaryIO | None = None) -> None:
        """`stream` None is standard output."""
        self._service = service
        self._stream = sys.stdout.buffer if stream is None else stream
        self._for_people = stream is None and sys.stdout.isatty()
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(
        self, method: str, path: str, status: int, started_s: float, request_id: str, user: int | None, trace: str
    ) -> None:
        """`started_s` is `time.perf_counter()` when the request began."""
        duration_ms = round((time.perf_counter() - started_s) * 1000, 2)
        now = timestamp(now_ms())
        line = AccessLine(method, path, status, duration_ms, request_id, user, self._service, now, trace)
        if self._for_people:
            self._lines.append(f"{line.timestamp} {status} {method} {path} {duration_ms} ms {request_id}".encode())
        else:
            self._lines.append(self._encode(line))
        if len(self._lines) >= _LINES_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Write what there is. Call it at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            self._lines.append(b"")
            data = b"\n".join(self._lines)
            self._lines = []
            self._stream.write(data)
            self._stream.flush()
