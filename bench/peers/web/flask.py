"""Flask + Redis: `users.py` under gunicorn, and a Redis at its package's defaults.

gunicorn's workers answer one request at a time and then close the connection (`sync`), or keep connections and use
threads (`gthread`). Which is faster depends on the machine, so both are measured; ours is compared with the faster.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from redis import Redis

from bench import machine
from bench.cluster import environment
from bench.peers.web import users
from bench.people import People
from bench.processes import Server, free_ports, require, wait_until
from bench.websystem import PROCESSES, Workload, wait_ready

WORKER_CLASSES = ("sync", "gthread")
# Of one process: the fastest of 2, 4, 8 and 16. More only wait for the interpreter's lock.
_THREADS = 4


def system_name(worker_class: str) -> str:
    return f"Flask + Redis (1 node; {worker_class})"


class Flask:
    workload = Workload.USERS

    def __init__(self, worker_class: str) -> None:
        self.name = system_name(worker_class)
        self.url = ""
        self._worker_class = worker_class
        self._program = require("redis", "redis-server")
        self._redis: Server | None = None
        self._service: Server | None = None

    def start(self, scratch: Path, people: People) -> None:
        socket = scratch / "redis.sock"
        command = [self._program, "--port", "0", "--unixsocket", str(socket), "--dir", str(scratch)]
        self._redis = Server("Redis", command, scratch / "redis.log")
        wait_until("Redis to listen", lambda: socket.exists() or None, [self._redis])
        with Redis(unix_socket_path=str(socket)) as redis:
            _fill(redis, people)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "gunicorn", f"{users.__name__}:create_app()", "--bind", f"127.0.0.1:{port}"]
        command += ["--workers", str(PROCESSES), "--worker-class", self._worker_class, "--preload"]
        if self._worker_class == "gthread":
            command += ["--threads", str(_THREADS)]
        self._service = Server(
            "Flask under gunicorn",
            command,
            scratch / "gunicorn.log",
            environment={**environment(), users.SOCKET: str(socket)},
        )
        wait_ready(self._service, self.url, "Booting worker with pid")

    def cpu_seconds(self) -> Mapping[str, float]:
        assert self._service is not None
        assert self._redis is not None
        return {"database": machine.cpu_seconds([self._redis.pid]), "services": machine.tree_seconds(self._service.pid)}

    def taken(self) -> int:
        return 0

    def check(self) -> None:
        assert self._service is not None
        assert self._redis is not None
        self._service.check()
        self._redis.check()

    def stop(self) -> None:
        for server in (self._service, self._redis):
            if server is not None:
                server.stop()
        self._service = self._redis = None


def _fill(redis: Redis, people: People) -> None:
    pipeline = redis.pipeline(transaction=False)
    pipeline.hset(users.SIGNING_KEYS, people.key.kid, people.key.secret)
    for customer in people.customers:
        user = customer.user
        pipeline.hset(
            f"user:{user.id}",
            mapping={
                "email": user.email,
                "name": user.name,
                "age": user.age,
                "role": user.role.value,
                "password_hash": user.password_hash,
                "created_ms": user.created_ms,
                "version": 1,
            },
        )
    pipeline.execute()
