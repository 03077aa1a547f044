"""Our own services under `python -m bench http`: three nodes with fsync, and one service as two processes on them.

The accounts go straight into the store (registering hashes a password each), the product and its stock through the
service, as staff would put them.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from bench import machine
from bench.cluster import Cluster, environment
from bench.people import People
from bench.processes import Server, free_ports
from bench.websystem import (
    CURRENCY,
    PRICE,
    PROCESSES,
    PRODUCT_NAME,
    SKU,
    STOCK,
    Workload,
    send,
    wait_ready,
)
from kvstore import model
from services.users.records import encode, user_key
from services.web.tokens import CURRENT_KEY, KEY_PREFIX

_SERVICES = {Workload.ORDERS: "orders", Workload.USERS: "users"}


class _Stock(Struct, frozen=True):
    """What `GET /v1/products/{sku}/stock` answers, as far as it matters here."""

    available: int


class Shop:
    """One of our services, and its store."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.name = name
        self.workload = workload
        self.url = ""
        self._cluster = Cluster([])
        self._service: Server | None = None

    def start(self, scratch: Path, people: People) -> None:
        self._cluster.start(scratch)
        self._cluster.prepare(_records(people))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        service = _SERVICES[self.workload]
        command = [sys.executable, "-m", "services", service, "--port", str(port), "--workers", str(PROCESSES)]
        command += ["--endpoints", ",".join(self._cluster.endpoints), "--no-access-log"]
        self._service = Server(
            f"the service of {service}",
            command,
            scratch / f"{service}.log",
            environment=environment(),
            directory=scratch,  # its mails go below it
        )
        wait_ready(self._service, self.url, "listening")
        if self.workload is Workload.ORDERS:
            self._put_product(people)

    def cpu_seconds(self) -> Mapping[str, float]:
        assert self._service is not None
        nodes = {name: machine.cpu_seconds(pids) for name, pids in self._cluster.pids.items()}
        return {**nodes, "services": machine.tree_seconds(self._service.pid)}

    def taken(self) -> int:
        if self.workload is not Workload.ORDERS:
            return 0
        level = msgspec.json.decode(send("GET", f"{self.url}/v1/products/{SKU}/stock", {}), type=_Stock)
        return STOCK - level.available

    def check(self) -> None:
        assert self._service is not None
        self._service.check()
        self._cluster.check()

    def stop(self) -> None:
        if self._service is not None:
            self._service.stop()
            self._service = None
        self._cluster.stop()

    def _put_product(self, people: People) -> None:
        headers = {"Authorization": f"Bearer {people.staff_token}", "Content-Type": "application/json"}
        product = {"name": PRODUCT_NAME, "price": PRICE, "currency": CURRENCY}
        send("PUT", f"{self.url}/v1/products/{SKU}", headers, msgspec.json.encode(product))
        headers["Idempotency-Key"] = secrets.token_hex(16)
        received = {"delta": STOCK, "reason": "received"}
        send("POST", f"{self.url}/v1/products/{SKU}/stock", headers, msgspec.json.encode(received))


def _records(people: People) -> Iterator[model.Mutation]:
    yield model.Put(KEY_PREFIX + people.key.kid.encode(), msgspec.json.encode(people.key))
    yield model.Put(CURRENT_KEY, people.key.kid.encode())
    for customer in people.customers:
        yield model.Put(user_key(customer.user.id), encode(customer.user))
