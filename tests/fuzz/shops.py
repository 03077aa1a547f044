"""What is fuzzed: both services as they run in earnest, over one embedded store with a little in it."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Final

import aiohttp
from aiohttp import web

import kvstore
from services.orders.app import create_app as create_orders
from services.users.app import create_app as create_users
from services.users.mail import FileMailer
from services.users.parts import Settings, create_staff
from services.web.runner import ServiceRunner
from services.web.tokens import Role, SigningKeys, Tokens
from tests.cluster.harness import until
from tests.services.conftest import has_leases

SERVICES: Final = ("users", "orders")
WHO: Final = ("nobody", *(role.value for role in Role))
# As the document's examples have them, so that some requests made of those find something.
_EMAIL: Final = "ada@example.com"
_PASSWORD: Final = "correct horse battery staple"
_SKUS: Final = ("mug-blue", "0", "A")
_COUNTED: Final = re.compile(r'http_request_seconds_count\{method="(.+)",path="(.+)",status="(\d+)"\} (\d+)')


class FuzzedShop:
    """`async with FuzzedShop(path, for_s=60) as shop: shop.url("orders"), shop.headers("staff")`"""

    def __init__(self, path: Path, for_s: float) -> None:
        self._path = path
        self._for_s = for_s
        self._runners: dict[str, ServiceRunner] = {}
        self._tokens: dict[str, str] = {}

    async def __aenter__(self) -> FuzzedShop:
        self._embedded = kvstore.open_embedded(str(self._path / "store"))
        store = await self._embedded.__aenter__()
        await until(lambda: has_leases(store), 10.0, "leases", poll_s=0.005)
        settings = Settings(mailer=FileMailer(str(self._path / "mail")))
        apps = {"users": create_users(store, settings=settings), "orders": create_orders(store)}
        for name, app in apps.items():
            runner = self._runners[name] = ServiceRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        await self._open_accounts(store)
        await self._stock()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners.values():
            await runner.cleanup()
        await self._embedded.__aexit__(kind, error, trace)

    def url(self, service: str) -> str:
        host, port = self._runners[service].addresses[0][:2]
        return f"http://{host}:{port}"

    def headers(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._tokens[who]}"} if who in self._tokens else {}

    async def document(self, service: str) -> dict[str, dict[str, dict[str, object]]]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.url(service)}/openapi.json") as answer:
            document: dict[str, dict[str, dict[str, object]]] = await answer.json()
            return document

    async def answered(self, service: str) -> Counter[tuple[str, str, int]]:
        """How often each endpoint answered with each status: (method, path, status)."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url(service)}/metrics") as answer:
            found = _COUNTED.findall(await answer.text())
        return Counter({(method, path, int(status)): int(count) for method, path, status, count in found})

    async def _open_accounts(self, store: kvstore.Client) -> None:
        """Their tokens belong to no session, so that fuzzing cannot end it, and are good until the end."""
        tokens = Tokens(SigningKeys(store), lambda: time.time() + self._for_s)
        for role in Role:
            # Staff have the password of the examples, so all that asks for it again is done as well, erasure included.
            password = _PASSWORD if role is Role.STAFF else f"the {role}'s own"
            user = await create_staff(store, f"{role}@example.com", password, "Ada", 36, role, replace=False)
            self._tokens[role.value] = await tokens.issue(user.id, role)
        await create_staff(store, _EMAIL, _PASSWORD, "Ada", 36, Role.CUSTOMER, replace=False)

    async def _stock(self) -> None:
        async with aiohttp.ClientSession(self.url("orders"), headers=self.headers("staff")) as session:
            for sku in _SKUS:
                product = {"name": f"A {sku}", "price": 1250, "currency": "EUR"}
                async with session.put(f"/v1/products/{sku}", json=product) as answer:
                    assert answer.status == 201, await answer.text()
                body, key = {"delta": 1_000_000, "reason": "received"}, {"Idempotency-Key": sku}
                async with session.post(f"/v1/products/{sku}/stock", json=body, headers=key) as answer:
                    assert answer.status == 201, await answer.text()
