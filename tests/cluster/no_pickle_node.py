"""The `kvstore` command in a process where unpickling leaves a mark and fails. Same arguments.

    KVSTORE_TEST_PICKLE_MARKER=FILE python -m tests.cluster.no_pickle_node serve …

Every way into pickle that Python and pysyncobj have is replaced, after pysyncobj was imported (it looks into the
unpickler's table when it is) and before anything runs. It also uses small limits, so that snapshots are needed soon.
"""

from __future__ import annotations

import _pickle
import os
import pickle
import sys
from typing import Any, NoReturn

import pysyncobj.journal
import pysyncobj.pickle

from tests.cluster.small_limits import use_small_limits

MARKER = "KVSTORE_TEST_PICKLE_MARKER"


class Unpickled(Exception):
    """Something was about to be unpickled."""


def _refuse(what: str) -> NoReturn:
    with open(os.environ[MARKER], "a") as marker:
        marker.write(f"{what}\n")
    raise Unpickled(what)


def _refusing(what: str) -> Any:
    def refuse(*_arguments: object, **_named: object) -> NoReturn:
        _refuse(what)

    return refuse


class _RefusingUnpickler:
    def __init__(self, *_arguments: object, **_named: object) -> None:
        _refuse("Unpickler")


def poison() -> None:
    modules: list[Any] = [pickle, _pickle, pysyncobj.pickle, pysyncobj.journal]
    for module in modules:
        for name in ("load", "loads", "_load", "_loads"):
            if hasattr(module, name):
                setattr(module, name, _refusing(f"{module.__name__}.{name}"))
        for name in ("Unpickler", "_Unpickler"):
            if hasattr(module, name):
                setattr(module, name, _RefusingUnpickler)


def main() -> NoReturn:
    poison()
    use_small_limits()
    from kvstore.cli.main import run

    sys.exit(run())


if __name__ == "__main__":
    main()
