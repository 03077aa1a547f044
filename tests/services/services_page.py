"""Writes what of docs/services.md the code decides, and its picture: `python -m tests.services.services_page`.

Each part stands between two marks, `<!-- states: begin -->` and `<!-- states: end -->`. Tests hold the page to it.
"""

from __future__ import annotations

import asyncio
import enum
import re
import sys
from collections.abc import Callable
from typing import Any, Final

import click
import msgspec
from aiohttp.test_utils import make_mocked_request

import kvstore
from services.__main__ import main as commands
from services.audit.findings import CODES
from services.audit.run import audit as _declares_them_all  # noqa: F401
from services.orders.app import create_app as create_orders
from services.orders.states import MACHINES
from services.orders.steps import PARK_REASONS
from services.users.app import create_app as create_users
from services.web.problems import PROBLEMS
from tests.cluster.harness import ROOT
from tests.services.order_picture import draw

PAGE: Final = ROOT / "docs" / "services.md"
PICTURE: Final = ROOT / "docs" / "order-states.svg"
# What a deployment starts.
COMMANDS: Final = ("users", "orders", "worker")
_METHODS: Final = ("get", "post", "put", "patch", "delete")


def states() -> str:
    parts = []
    for machine in MACHINES:
        lines = ["| from | event | to | only if | in the same transaction |", "|---|---|---|---|---|"]
        for step in machine.transitions:
            source = f"`{step.source}`" if step.source is not None else ""
            event = step.event.replace("_", " ")
            lines.append(f"| {source} | {event} | `{step.target}` | {step.guard} | {step.effects} |")
        parts.append(f"**{machine.noun.capitalize()}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def endpoints() -> str:
    return "\n\n".join(_endpoints_of(document) for document in documents())


def documents() -> list[dict[str, Any]]:
    """The published documents of the user service and the order service."""

    async def read() -> list[dict[str, Any]]:
        # Neither asks the store for anything before it is started.
        store = kvstore.connect("127.0.0.1:1")
        found = []
        for app in (create_users(store), create_orders(store)):
            request = make_mocked_request("GET", "/openapi.json")
            handler = next(route.handler for route in app.router.routes() if _path_of(route) == "/openapi.json")
            found.append(msgspec.json.decode((await handler(request)).body))
        return found

    return asyncio.run(read())


def _path_of(route: Any) -> str:
    return str(route.resource.canonical) if route.resource is not None else ""


def _endpoints_of(document: dict[str, Any]) -> str:
    lines = [f"**{document['info']['title']}**", "", "| | | for | |", "|---|---|---|---|"]
    for tag in document["tags"]:
        for path, operations in document["paths"].items():
            for method in _METHODS:
                operation = operations.get(method)
                if operation is not None and tag["name"] in operation["tags"]:
                    what = f"`{method.upper()} {path}`"
                    lines.append(f"| {what} | {operation['summary']} | {_who(operation)} | {_headers(operation)} |")
    return "\n".join(lines)


def _who(operation: dict[str, Any]) -> str:
    role = re.search(r"For (staff|admin)\.$", operation.get("description", ""))
    if role is not None:
        return role[1]
    return "signed in" if operation["security"] and {} not in operation["security"] else "anyone"


def _headers(operation: dict[str, Any]) -> str:
    found = {one["name"]: one["required"] for one in operation["parameters"] if one["in"] == "header"}
    said = []
    if "Idempotency-Key" in found:
        said.append("key")
    if "If-Match" in found:
        said.append("If-Match required" if found["If-Match"] else "If-Match")
    return ", ".join(said)


def problems() -> str:
    lines = ["| code | status | | again? |", "|---|---|---|---|"]
    for code, kind in sorted(PROBLEMS.items(), key=lambda item: (item[1].status, item[0])):
        lines.append(f"| `{code}` | {kind.status} | {kind.title} | {'yes' if kind.retryable else ''} |")
    return "\n".join(lines)


def reasons() -> str:
    lines = ["| code of a parked step | |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{code}` | {meaning} |" for code, meaning in PARK_REASONS.items())])


def options() -> str:
    """Each option once, with the commands that have it."""
    found: dict[str, tuple[click.Option, list[str]]] = {}
    for name in COMMANDS:
        for option in commands.commands[name].params:
            assert isinstance(option, click.Option)
            if not option.hidden:
                found.setdefault(_spelt(option), (option, []))[1].append(name)
    lines = ["| option | of | default | |", "|---|---|---|---|"]
    for spelt, (option, names) in found.items():
        of = "all" if len(names) == len(COMMANDS) else ", ".join(names)
        help_text = option.help or ""
        if option.envvar:
            help_text = f"{help_text} Or `{option.envvar}`.".strip()
        lines.append(f"| {spelt} | {of} | {_default(option, names)} | {help_text} |")
    return "\n".join(lines)


def checks() -> str:
    """What the auditor proves, in the order in which it is declared."""
    lines = ["| code | what it proves |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{code}` | {proves} |" for code, proves in CODES.items())])


def _spelt(option: click.Option) -> str:
    return " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: click.Option, names: list[str]) -> str:
    """As each command that has it says it."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.secondary_opts:
        return "on" if option.default else "off"
    defaults = []
    for name in names:
        command = commands.commands[name]
        same = next(one for one in command.params if one.name == option.name)
        value = same.get_default(click.Context(command))
        if value not in (None, (), False) and not isinstance(value, enum.Enum):  # click's mark of having none
            defaults.append(f"`{value}`")
    return ", ".join(dict.fromkeys(defaults))


PARTS: Final[dict[str, Callable[[], str]]] = {
    "states": states,
    "endpoints": endpoints,
    "problems": problems,
    "reasons": reasons,
    "options": options,
    "checks": checks,
}


def written(page: str) -> str:
    """The page with each part as the code says it. Raises ValueError where it has no place."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no place for {name}: {begin.strip()} … {end}")
        page = f"{before}{begin}\n{part()}\n\n{end}{after}"
    return page


def main() -> int:
    for path, text in ((PAGE, written(PAGE.read_text(encoding="utf-8"))), (PICTURE, draw())):
        path.write_text(text, encoding="utf-8")
        print(f"{path.name} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
