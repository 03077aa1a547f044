"""PostgreSQL, as `postgres_server.py` starts it, loaded by pgbench.

All scripts run with `-M prepared`. An order that finds no stock ends pgbench with an error, and so the run.

What the workloads do, so that the comparison is fair and can be judged:

- `order-hot`: a transaction of four statements that writes the four rows that ours writes: take one from the one
  product's stock where there is enough, insert the order, its entry in the user's index, its idempotency key.
- `order-1000`: the same over 1,000 products.
- `order-hot, stock last`: the same with the stock taken last, so that its lock is held the shortest.
- `order-hot, 2 rows`: a transaction that takes the stock and inserts the order, nothing else.
- `order-hot, 1 statement`: all four rows by one statement of nested WITHs, without BEGIN and COMMIT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bench import machine, workloads
from bench.peers import Durations, postgres_server
from bench.peers.postgres_server import DATABASE, PostgresServer
from bench.processes import run_tool
from bench.results import BenchError, Measurement, percentile

SYSTEM = "PostgreSQL (1 node, pgbench)"
CONNECTIONS = 64
# What pgbench may take beyond its own duration.
_TOOL_GRACE_S = 30.0

_SCHEMA = """
CREATE TABLE stock (product int PRIMARY KEY, quantity bigint NOT NULL);
CREATE TABLE orders (id bigserial PRIMARY KEY, body text NOT NULL);
CREATE TABLE user_orders (user_id int, order_id bigint, PRIMARY KEY (user_id, order_id));
CREATE TABLE idempotency (user_id int, key bigint, fingerprint text NOT NULL, PRIMARY KEY (user_id, key));
INSERT INTO stock SELECT product, {stock} FROM generate_series(1, {products}) AS product;
"""
_PICK = r"""
\set product random(1, {products})
\set user random(1, 10000)
\set key random(1, 9223372036854775806)
"""
# \gset fails where the statement gives no row, so an order without stock ends the run.
_TAKE = r"UPDATE stock SET quantity = quantity - 1 WHERE product = :product AND quantity >= 1 RETURNING quantity \gset"
_ORDER = r"INSERT INTO orders (body) VALUES ('{body}') RETURNING id AS order_id \gset"
_INDEX = "INSERT INTO user_orders VALUES (:user, :order_id);"
_KEY = "INSERT INTO idempotency VALUES (:user, :key, '{fingerprint}');"
_STATEMENT = r"""
WITH taken AS (
    UPDATE stock SET quantity = quantity - 1 WHERE product = :product AND quantity >= 1 RETURNING quantity
), placed AS (
    INSERT INTO orders (body) SELECT '{body}' FROM taken RETURNING id
), indexed AS (
    INSERT INTO user_orders SELECT :user, id FROM placed
)
INSERT INTO idempotency SELECT :user, :key, '{fingerprint}' FROM placed RETURNING key AS done \gset
"""


def _transaction(*statements: str) -> str:
    return "\n".join((_PICK, "BEGIN;", *statements, "COMMIT;", ""))


# Workload -> (products, script).
_SCRIPTS = {
    "order-hot": (1, _transaction(_TAKE, _ORDER, _INDEX, _KEY)),
    "order-1000": (workloads.PRODUCTS, _transaction(_TAKE, _ORDER, _INDEX, _KEY)),
    "order-hot, stock last": (1, _transaction(_ORDER, _INDEX, _KEY, _TAKE)),
    "order-hot, 2 rows": (1, _transaction(_TAKE, _ORDER)),
    "order-hot, 1 statement": (1, _PICK + _STATEMENT),
}

# The ways to order as a transaction that writes all four rows: ours is compared with the faster one.
TRANSACTIONS = ("order-hot", "order-hot, stock last")


class Postgres:
    def __init__(self, durations: Durations) -> None:
        self._durations = durations
        self._server = PostgresServer()
        self._pgbench = postgres_server.program("pgbench")

    def start(self, scratch: Path) -> None:
        self._server.start(scratch)
        self._server.run_script("schema.sql", _SCHEMA.format(stock=workloads.STOCK, products=workloads.PRODUCTS))

    def stop(self) -> None:
        self._server.stop()

    def measure(self, everything: bool) -> Iterator[Measurement]:
        for workload in _SCRIPTS if everything else TRANSACTIONS:
            self._load(workload, self._durations.warmup_s)
            yield self._load(workload, self._durations.window_s)

    def _load(self, workload: str, duration_s: float) -> Measurement:
        products, template = _SCRIPTS[workload]
        script = self._server.directory / "order.sql"
        script.write_text(template.format(products=products, body=workloads.value_of(0).decode(), fingerprint="0" * 32))
        logs = self._server.directory / "transactions"
        whole_s = max(1, round(duration_s))
        command = [
            self._pgbench,
            *self._server.connection_options(),
            "-n",
            "-M",
            "prepared",
            "-c",
            str(CONNECTIONS),
            "-j",
            "1",
        ]
        command += ["-T", str(whole_s), "-f", str(script), "-l", f"--log-prefix={logs}", DATABASE]
        before, busy_before, tool_before = self._server.cpu_seconds(), machine.busy_seconds(), machine.tools_seconds()
        printed = run_tool(command, timeout_s=whole_s + _TOOL_GRACE_S)
        # pgbench's backends have ended with it, and the postmaster has collected what they used.
        used, busy = self._server.cpu_seconds() - before, machine.busy_seconds() - busy_before
        tool = machine.tools_seconds() - tool_before
        latencies_us = []
        for log in self._server.directory.glob("transactions.*"):
            with open(log) as file:
                latencies_us += [int(line.split()[2]) for line in file]
            log.unlink()
        found = re.search(r"^tps = ([0-9.]+) ", printed, re.MULTILINE)
        if found is None or not latencies_us:
            raise BenchError(f"pgbench printed no result:\n{printed[-800:]}")
        latencies_us.sort()
        count = len(latencies_us)
        return Measurement(
            system=SYSTEM,
            workload=workload,
            connections=CONNECTIONS,
            seconds=float(whole_s),
            operations=count,
            per_second=float(found.group(1)),
            p50_ms=percentile(latencies_us, 0.5) / 1e3,
            p99_ms=percentile(latencies_us, 0.99) / 1e3,
            p999_ms=percentile(latencies_us, 0.999) / 1e3,
            cpu_us_per_op={"nodes": used * 1e6 / count, "generator": tool * 1e6 / count},
            others_cores=max(0.0, busy - used - tool) / whole_s,
        )
