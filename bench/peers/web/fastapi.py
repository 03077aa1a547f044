"""FastAPI + asyncpg + PostgreSQL: `orders.py` under uvicorn, and its database."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from bench import machine
from bench.cluster import environment
from bench.peers import postgres_server
from bench.peers.postgres_server import PostgresServer
from bench.peers.web import orders
from bench.people import People
from bench.processes import Server, free_ports
from bench.results import BenchError
from bench.websystem import CURRENCY, PRICE, PROCESSES, PRODUCT_NAME, SKU, STOCK, Workload, wait_ready

SYSTEM = "FastAPI + asyncpg + PostgreSQL (1 node)"
_TABLES = ("orders", "order_event", "step", "idempotency")  # each has one row for an order
_SCHEMA = Path(__file__).with_name("orders.sql")


class FastApi:
    name = SYSTEM
    workload = Workload.ORDERS

    def __init__(self) -> None:
        self.url = ""
        self._database = PostgresServer()
        self._service: Server | None = None

    def start(self, scratch: Path, people: People) -> None:
        self._database.start(scratch)
        self._database.run_script("schema.sql", schema(people))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "uvicorn", f"{orders.__name__}:app", "--port", str(port)]
        command += ["--workers", str(PROCESSES), "--loop", "uvloop", "--http", "httptools"]
        command += ["--no-access-log"]
        self._service = Server(
            "FastAPI under uvicorn",
            command,
            scratch / "uvicorn.log",
            environment={**environment(), orders.DSN: dsn(scratch)},
        )
        wait_ready(self._service, self.url, "Application startup complete")

    def cpu_seconds(self) -> Mapping[str, float]:
        assert self._service is not None
        return {"database": self._database.cpu_seconds(), "services": machine.tree_seconds(self._service.pid)}

    def taken(self) -> int:
        """Raises BenchError unless every row that belongs to an order is there as often as the product was taken."""
        counts = ", ".join(f"(SELECT count(*) FROM {table})" for table in _TABLES)
        found = self._database.sql("-c", f"SELECT {STOCK} - on_hand, reserved, {counts} FROM stock WHERE sku = '{SKU}'")
        taken, *others = map(int, found.split("|"))
        if any(count != taken for count in others):
            raise BenchError(f"{SYSTEM}: {taken} were taken from stock; reserved and rows of orders: {others}")
        return taken

    def check(self) -> None:
        assert self._service is not None
        self._service.check()
        self._database.check()

    def stop(self) -> None:
        if self._service is not None:
            self._service.stop()
            self._service = None
        self._database.stop()


def dsn(directory: Path) -> str:
    """Where the database is whose socket is in this directory."""
    return f"postgresql://{postgres_server.USER}@/{postgres_server.DATABASE}?host={directory}"


def schema(people: People) -> str:
    """The tables, the product and the key. Orders never look at accounts, here or in ours."""
    return f"""{_SCHEMA.read_text()}
INSERT INTO product VALUES ('{SKU}', '{PRODUCT_NAME}', {PRICE}, '{CURRENCY}', 1);
INSERT INTO stock VALUES ('{SKU}', {STOCK}, 0);
INSERT INTO signing_key VALUES ('{people.key.kid}', decode('{people.key.secret.hex()}', 'hex'));
"""
