"""What `python -m bench http` needs of a system, ours or a peer's: started with people and a product, then loaded."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from bench.people import People
from bench.processes import Server, wait_until
from bench.results import BenchError

PROCESSES = 2  # that answer HTTP, of every system
# What everyone buys one of, and more of it than any run sells: an order that is refused fails the run.
SKU, PRODUCT_NAME, PRICE, CURRENCY, STOCK = "hot-1", "A kettle that everyone wants", 2995, "EUR", 10**9
# Of a request that prepares or proves something; past this something hangs.
_ANSWER_S = 10.0


class Workload(StrEnum):
    ORDERS = "POST /v1/orders"
    USERS = "GET /user/{id}"


class WebSystem(Protocol):
    """Used from one thread: `start`, `url` and the others any number of times, then `stop` (also after a failed
    start)."""

    name: str
    workload: Workload

    def start(self, scratch: Path, people: People) -> None:
        """Start it below `scratch`, with these accounts and the product, ready for load. Raises BenchError."""

    @property
    def url(self) -> str: ...

    def cpu_seconds(self) -> Mapping[str, float]:
        """What its processes have used, by their part."""

    def taken(self) -> int:
        """How many of the product its orders have taken, as its store says; 0 where there is none."""

    def check(self) -> None:
        """Raises BenchError if a process of it has ended."""

    def stop(self) -> None: ...


def wait_ready(server: Server, url: str, said: str) -> None:
    """Until `/readyz` answers 200 and each of the processes has `said` so in the output that they share: connections
    that are opened before all of them listen would all go to the first. Raises BenchError."""

    def look() -> bool | None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=_ANSWER_S) as answer:
                ready = answer.status == 200
        except OSError:  # not listening, or not ready, yet; `wait_until` looks at whether it ended
            return None
        return True if ready and server.output().count(said) >= PROCESSES else None

    wait_until(f"{server.name} to be ready", look, [server])


def send(method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> bytes:
    """The body of a successful answer. Raises BenchError for any other."""
    request = urllib.request.Request(url, body, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise BenchError(f"{method} {url} was answered {error.code}: {error.read()[:400]!r}") from None
    except OSError as error:
        raise BenchError(f"{method} {url}: {error}") from None
