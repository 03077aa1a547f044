"""`python -m tests.cluster.previous_version serve …`: the `kvstore` command as version 1 was, which knows no leases.

It says that it is version 1, refuses entries and states of a later one, and stops where it should apply what it does
not know. It asks no cluster for its version before it joins. `make upgrade FROM=…` runs the same test with a real
earlier commit instead.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import msgspec

from kvstore import NodeStatus, versions
from kvstore.cli import join
from kvstore.cli.main import run
from kvstore.errors import InternalError
from kvstore.state.machine import Machine


def _unknown(_machine: Machine, _view: Any, _at: int, request: Any) -> NoReturn:
    raise InternalError(f"version 1 does not know {type(request).__name__}")


_ask = join._ask


async def _ask_no_version(endpoints: str, timeout_s: float) -> NodeStatus:
    return msgspec.structs.replace(await _ask(endpoints, timeout_s), cluster_version=1)


def main() -> NoReturn:
    versions.VERSION = 1
    join._ask = _ask_no_version
    Machine._change_leases = _unknown  # type: ignore[method-assign]
    sys.exit(run())


if __name__ == "__main__":
    main()
