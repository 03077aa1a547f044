"""Holds the floors of design section 2: who may import what, and what the outside world is reached through.

Read from the source by its syntax tree, so nothing is imported here and an import inside a function counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES_MAX = 700

GROUND = {"model", "errors", "codec", "limits", "env", "seldom", "backup", "meters", "versions"}
# What each room may import of kvstore besides itself. A room that is not here (cli) may import all below it.
FLOORS = {
    "state": GROUND - {"env", "seldom"},
    "raft": GROUND,
    "server": GROUND | {"state", "raft"},
    "client": GROUND,
    "cli": GROUND | {"state", "raft", "server", "client", ""},
}
GROUND_MAY_IMPORT = {
    "model": set(),
    "errors": set(),
    "codec": {"model", "errors"},
    "limits": {"model", "errors"},
    "seldom": {"env"},
    "backup": {"model", "errors"},
    "meters": set(),
    "versions": {"model", "errors"},
}

OUTSIDE_WORLD = {
    "_thread",
    "concurrent",
    "datetime",
    "fcntl",
    "io",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, dotted; `from a import b` gives `a.b` as well as `a`."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            for alias in node.names:
                yield f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "importlib.import_module"}:
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) else "an import that only running it tells"


def top(module: str) -> str:
    return module.split(".")[0]


def kvstore_rooms(path: Path) -> set[str]:
    """The rooms of kvstore that a file imports; `""` is the public face itself."""
    rooms = set()
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "kvstore":
            rooms.add(parts[1] if len(parts) > 1 else "")
    known = {entry.stem for entry in (ROOT / "kvstore").iterdir()}
    # `from kvstore import x` names both kvstore and kvstore.x; only what is no room is the public face.
    return {room for room in rooms if room in known} | ({""} if rooms - known - {""} else set())


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_lower_floors(room: str) -> None:
    for path in sources(f"kvstore/{room}"):
        above = kvstore_rooms(path) - FLOORS[room] - {room}
        assert not above, f"{name_of(path)} imports {sorted(above)}, which is not below {room}"


@pytest.mark.parametrize("module", GROUND_MAY_IMPORT)
def test_the_ground_floor_stands_on_itself(module: str) -> None:
    above = kvstore_rooms(ROOT / f"kvstore/{module}.py") - GROUND_MAY_IMPORT[module]
    assert not above, f"kvstore/{module}.py imports {sorted(above)}"


def test_services_use_only_the_public_face_of_kvstore() -> None:
    for path in sources("services"):
        for module in imports(path):
            if top(module) != "kvstore" or module == "kvstore":
                continue
            _, name, *deeper = module.split(".")
            is_module = (ROOT / "kvstore" / name).is_dir() or (ROOT / "kvstore" / f"{name}.py").is_file()
            assert not deeper, f"{name_of(path)} imports {module}; services use only `import kvstore`"
            assert not is_module, f"{name_of(path)} imports {module}; services use only `import kvstore`"


def test_kvstore_knows_nothing_of_services_tests_and_bench() -> None:
    for path in sources("kvstore", "services"):
        for module in imports(path):
            assert top(module) not in {"tests", "bench"}, f"{name_of(path)} imports {module}"
            if path.is_relative_to(ROOT / "kvstore"):
                assert top(module) != "services", f"{name_of(path)} imports {module}"


def test_raft_server_and_state_reach_the_outside_only_through_env() -> None:
    for path in sources("kvstore/raft", "kvstore/server", "kvstore/state"):
        for module in imports(path):
            assert top(module) not in OUTSIDE_WORLD, f"{name_of(path)} imports {module}; use kvstore/env.py"


def test_raft_and_server_open_no_file_themselves() -> None:
    for path in sources("kvstore/raft", "kvstore/server", "kvstore/state"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", f"{name_of(path)}:{node.lineno} opens a file; use kvstore/env.py"


def test_the_state_machine_is_pure() -> None:
    for path in sources("kvstore/state"):
        for module in imports(path):
            assert top(module) not in {"asyncio", "uvloop"}, f"{name_of(path)} imports {module}"
            if path.name != "storage.py":
                assert top(module) != "rocksdict", f"{name_of(path)} imports {module}; only storage.py may"


def test_only_the_engine_meets_pysyncobj() -> None:
    engine = ROOT / "kvstore/raft/engine.py"
    for path in sources("kvstore", "services"):
        if path == engine:
            continue
        for module in imports(path):
            assert top(module) != "pysyncobj", f"{name_of(path)} imports {module}; only raft/engine.py may"
        assert "_SyncObj__" not in path.read_text(), f"{name_of(path)} touches a private name of pysyncobj"


def test_nothing_is_pickled() -> None:
    for path in sources("kvstore", "services", "bench"):
        for module in imports(path):
            assert top(module) not in PICKLES, f"{name_of(path)} imports {module}"


def test_no_file_is_too_long() -> None:
    for path in sources("kvstore", "services", "bench", "tests"):
        lines = len(path.read_text().splitlines())
        assert lines <= LINES_MAX, f"{name_of(path)} has {lines} lines; past {LINES_MAX} look for the second idea"
