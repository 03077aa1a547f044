"""docs/services.md says what the code says, and every curl line of it works."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

import kvstore
from services.__main__ import create_staff as create_staff_command
from services.orders import steps
from services.orders.draft import ATTENTION_CODES_MAX
from services.payments.loading import load_provider
from services.payments.provider import Provider
from services.sandbox_psp.process import API_KEY, WEBHOOK_SECRET
from services.users.mail import Mail, load_mailer, send
from services.users.parts import create_staff
from services.web.app import bare_app
from services.web.tokens import Role
from tests.cluster.harness import ROOT
from tests.services.order_picture import draw
from tests.services.page_lines import Shell, functions_of, lines_of
from tests.services.paid_shop import PaidShop
from tests.services.services_page import PAGE, PICTURE, documents, written

TEXT = PAGE.read_text(encoding="utf-8")
REWRITE = "run `python -m tests.services.services_page`"


def test_the_generated_parts_are_what_the_code_says() -> None:
    assert written(TEXT) == TEXT, REWRITE


def test_the_picture_is_that_of_the_tables() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), REWRITE


def test_every_endpoint_has_a_curl_line() -> None:
    users, orders = documents()
    missing = {("$USERS", *one) for one in _operations(users)} | {("$ORDERS", *one) for one in _operations(orders)}
    for line in lines_of(TEXT):
        method, url = line.request
        service, _, path = url.partition("/")
        fitting = [one for one in missing if one[:2] == (service, method) and _fits(one[2], f"/{path}")]
        # What a path spells out is none of another's parameters: /v1/users/me is no /v1/users/{id}.
        missing -= set(sorted(fitting, key=lambda one: one[2].count("{"))[:1])
    assert not missing


def _operations(document: dict[str, dict[str, dict[str, object]]]) -> Iterator[tuple[str, str]]:
    for path, operations in document["paths"].items():
        for method in operations:
            yield method.upper(), path


def _fits(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path) is not None


@pytest.fixture
async def paid(store: kvstore.Client, tmp_path: Path) -> AsyncIterator[PaidShop]:
    async with PaidShop(store, tmp_path, with_users=True) as shop:
        yield shop


@pytest.mark.timeout(180)
async def test_every_curl_line_is_answered_as_the_page_says(
    store: kvstore.Client, paid: PaidShop, tmp_path: Path
) -> None:
    """With the stand-in, where there is no curl."""
    async with _told_of(store, paid) as worker:
        shell = await _shell(store, paid, tmp_path, shutil.which("curl"), WORKER=worker)
        for line in lines_of(TEXT):
            await shell.run(line)
    assert shell.variables["SAME"] == shell.variables["THIRD"]


async def test_the_stand_in_does_what_curl_does(store: kvstore.Client, paid: PaidShop, tmp_path: Path) -> None:
    """Up to the first stream: by then it has shown all that it can."""
    shell = await _shell(store, paid, tmp_path, None)
    for line in lines_of(TEXT):
        await shell.run(line)
        if line.event:
            break
    assert shell.variables["SAME"] == shell.variables["THIRD"]


def _told_of(store: kvstore.Client, paid: PaidShop) -> TestServer:
    """What tells of the shop's worker."""
    return TestServer(bare_app(store, why_not_ready=lambda: paid.worker.why_not_working))


async def _shell(store: kvstore.Client, paid: PaidShop, tmp_path: Path, curl: str | None, **more: TestServer) -> Shell:
    async def mail(kind: str) -> str:
        return (await paid.shop.outbox.next(kind)).token

    for email, password, role in _staff_of(TEXT):
        await create_staff(store, email, password, "Staff", 0, role, replace=False)
    clients = {"USERS": paid.shop.users, "ORDERS": paid.shop.orders, "PSP": paid.psp, **more}
    variables = {name: str(client.make_url("")).rstrip("/") for name, client in clients.items()}
    directory = tmp_path / "shell"
    directory.mkdir()
    return Shell(functions_of(TEXT), variables, directory, mail, str(Path(curl).parent) if curl else "")


def _staff_of(page: str) -> Iterator[tuple[str, str, Role]]:
    """Who is made by the page's `create-staff` lines, read by the command's own parser."""
    for found in re.finditer(r"^STAFF_PASSWORD=(\S+) python -m services create-staff (.*)$", page, re.MULTILINE):
        options = create_staff_command.make_context("create-staff", shlex.split(found[2])).params
        yield options["email"], found[1], Role(options["role"])


def test_every_reason_code_of_a_step_is_explained() -> None:
    """Those that a step can be parked with, and those that an order can need attention with."""
    table = TEXT[TEXT.index("## Background work") :].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == set(_reason_codes())


def test_an_order_has_room_for_every_reason() -> None:
    """No code of ours is ever dropped for another, nor one of a version that has a few more."""
    assert len(set(_reason_codes())) * 2 < ATTENTION_CODES_MAX


def _reason_codes() -> Iterator[str]:
    for path in (ROOT / "services").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("Again", "Park", "again", "want_attention") and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)
                elif isinstance(first, ast.Name) and first.id.isupper():
                    yield _constant(tree, first.id)
    yield from (steps.VOID_REFUSED, steps.PROVIDER_REFUSED, steps.UNREADABLE)  # handed on under other names


def _constant(tree: ast.Module, name: str) -> str:
    """What a module calls by that name; it may have it from another one, as `services.orders.steps` never does."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            assert isinstance(node.value, ast.Constant)
            return str(node.value.value)
    raise AssertionError(f"{name} is no constant of its module")


# --- what a deployment plugs in ---------------------------------------------------------------------------------------


def _plug_in(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the page's example of that module, where it can be imported from."""
    example = re.search(rf"^```python\n(# {name}\.py\n.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert example is not None
    (directory / f"{name}.py").write_text(example[1])
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delitem(sys.modules, name, raising=False)


async def test_the_example_of_a_provider_takes_money(
    store: kvstore.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plug_in("shop_payments", tmp_path, monkeypatch)
    open_provider = load_provider("shop_payments:open_provider", "")
    secrets = tmp_path / "payments.json"
    monkeypatch.setenv("SHOP_PAYMENTS", str(secrets))

    class Shop(PaidShop):
        def open_provider(self, session: aiohttp.ClientSession) -> Provider:
            url = str(self.psp.make_url(""))
            secrets.write_text(json.dumps({"url": url, "api_key": API_KEY, "webhook_secrets": [WEBHOOK_SECRET]}))
            return open_provider(session)

    async with Shop(store, tmp_path) as paid:
        await paid.shop.stock(paid.staff, "cup", 2)
        order = await paid.placed({"cup": 1})
        await paid.paid(order)
        await paid.becomes(order, payment_status="paid")


async def test_the_example_of_a_mailer_sends_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plug_in("shop_mail", tmp_path, monkeypatch)
    mailer = load_mailer("shop_mail:make")
    taken: list[str] = []
    server = await asyncio.start_server(partial(_take_mail, taken), "127.0.0.1", 0)
    async with server:
        monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
        monkeypatch.setenv("SMTP_PORT", str(server.sockets[0].getsockname()[1]))
        monkeypatch.setenv("SHOP_FROM", "shop@shop.example")
        mail = Mail("notice/7/ab", "notice", "ada@example.com", "Ada", "", "Good news", "Your cup is on its way.")
        await send(mailer, mail)
    (message,) = taken
    assert "To: ada@example.com" in message
    assert "Message-ID: <notice/7/ab@shop.example>" in message
    assert mail.text in message


async def _take_mail(taken: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As much of an SMTP server (RFC 5321) as takes mail."""
    writer.write(b"220 ready\r\n")
    while (command := await reader.readline()) and not command.upper().startswith(b"QUIT"):
        if command.upper().startswith(b"DATA"):
            writer.write(b"354 go on\r\n")
            taken.append((await reader.readuntil(b"\r\n.\r\n")).decode())
        writer.write(b"250 done\r\n")
    writer.write(b"221 bye\r\n")
    writer.close()
