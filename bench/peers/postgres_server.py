"""A PostgreSQL server of its own for a run: one node, fsync and synchronous_commit on, the rest at its defaults.

It runs under an unprivileged user (`postgres`, or `nobody`, where we are root: it refuses root) with a data directory
of its own and no TCP port: clients reach it over a Unix socket, which is faster.
"""

from __future__ import annotations

import os
import pwd
import signal
from pathlib import Path

from bench import machine
from bench.processes import Server, require, run_tool, wait_until
from bench.results import BenchError

DATABASE = "postgres"
USER = "bench"
# Debian keeps each version's server programs in a directory of its own.
_VERSIONS = Path("/usr/lib/postgresql")
_INITDB_OPTIONS = ["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "-D"]


def program(name: str) -> str:
    """Full path of one of PostgreSQL's programs, of the newest version. Raises BenchError where it is missing."""
    versions = sorted(_VERSIONS.glob("*/bin"), key=lambda path: float(path.parent.name))
    return require("postgres", name, [str(path) for path in reversed(versions)])


class PostgresServer:
    def __init__(self) -> None:
        self._initdb, self._postgres, self._psql = program("initdb"), program("postgres"), program("psql")
        self._user = _unprivileged_user()
        self._server: Server | None = None
        self.directory = Path()

    def start(self, scratch: Path) -> None:
        """An empty database below `scratch`, which answers. Raises BenchError."""
        self.directory = scratch
        data = scratch / "data"
        data.mkdir()
        # Its user must reach its data and its socket; nobody else needs to.
        if self._user is not None:
            for path in (scratch, data):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
            self._as_user([self._initdb, *_INITDB_OPTIONS, str(data)], "initdb")
        else:
            run_tool([self._initdb, *_INITDB_OPTIONS, str(data)], timeout_s=60.0)
        command = [self._postgres, "-D", str(data), "-k", str(scratch), "-h", "", "-p", "5432"]
        command += ["-c", "fsync=on", "-c", "synchronous_commit=on", "-c", "max_connections=200"]
        self._server = Server(
            "PostgreSQL",
            command,
            scratch / "postgres.log",
            user=self._user.pw_name if self._user else None,
            stop_signal=signal.SIGINT,  # its fast shutdown: it does not wait for clients
            directory=scratch,
        )
        wait_until("PostgreSQL to answer", self._answers, [self._server])
        settings = self.sql("-c", "SHOW fsync", "-c", "SHOW synchronous_commit").split()
        if settings != ["on", "on"]:
            raise BenchError(f"PostgreSQL runs with fsync, synchronous_commit {settings}: no comparison")

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def check(self) -> None:
        """Raises BenchError if it has ended."""
        assert self._server is not None
        self._server.check()

    def cpu_seconds(self) -> float:
        """Of the postmaster and its backends, also those that have ended."""
        assert self._server is not None
        return machine.tree_seconds(self._server.pid)

    def connection_options(self) -> list[str]:
        """For PostgreSQL's own clients."""
        return ["-h", str(self.directory), "-p", "5432", "-U", USER]

    def sql(self, *arguments: str) -> str:
        """What psql prints: rows as lines, columns with `|` in between. Raises BenchError where a statement fails."""
        command = [self._psql, *self.connection_options(), "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", *arguments]
        return run_tool([*command, DATABASE], timeout_s=60.0)

    def run_script(self, name: str, text: str) -> None:
        script = self.directory / name
        script.write_text(text)
        self.sql("-f", str(script))

    def _as_user(self, command: list[str], what: str) -> None:
        assert self._user is not None
        log = self.directory / f"{what}.log"
        tool = Server(what, command, log, user=self._user.pw_name, directory=self.directory)
        try:
            code = wait_until(what, tool.ended, timeout_s=60.0)
            if code != 0:
                raise BenchError(f"{what} as user {self._user.pw_name} ended with code {code}:\n{tool.output_tail()}")
        finally:
            tool.stop()

    def _answers(self) -> bool | None:
        try:
            self.sql("-c", "SELECT 1")
        except BenchError:  # it says so itself while it is starting; `wait_until` looks at whether it ended
            return None
        return True


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as: None for ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise BenchError("PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody`")
