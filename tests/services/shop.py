"""Both services in this process over one embedded store, and what the tests say to them."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

import kvstore
from services.orders.app import Settings as OrdersSettings
from services.orders.app import create_app as create_orders
from services.users.accounts import move_role
from services.users.app import create_app as create_users
from services.users.credentials import read_user
from services.users.mail import Mail
from services.users.parts import Settings
from services.users.records import encode, user_key
from services.web.ids import now_ms
from services.web.tokens import Role, SigningKeys, Tokens

PASSWORD = "correct horse battery staple"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Person:
    id: int
    email: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def once(self, key: str | None = None) -> dict[str, str]:
        """Headers with an Idempotency-Key: a new one unless given."""
        return {**self.headers, "Idempotency-Key": key or uuid.uuid4().hex}


class Clock:
    """The user service's clock: the real one, and as far ahead as a test says."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_ms(self) -> int:
        return now_ms() + int(self.ahead_s * 1000)


class Outbox:
    """A mailer that keeps what it is given."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []
        self.failures = 0
        self._came = asyncio.Event()

    async def send(self, mail: Mail) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("the mail server is down")
        self.mails.append(mail)
        self._came.set()

    async def next(self, kind: str) -> Mail:
        """The first mail of that kind, which is then taken out; waits for it."""
        async with asyncio.timeout(10):
            while True:
                for mail in self.mails:
                    if mail.kind == kind:
                        self.mails.remove(mail)
                        return mail
                self._came.clear()
                await self._came.wait()


class Shop:
    """`customer` and `staff` are people with tokens and no accounts: orders never look at accounts, and hashing
    passwords takes its time on purpose. `register` makes a real one."""

    def __init__(
        self,
        store: kvstore.Client,
        *,
        with_users: bool = True,
        orders_settings: OrdersSettings | None = None,
        orders_port: int | None = None,
    ) -> None:
        self.store = store
        self._with_users = with_users
        self.clock, self.outbox = Clock(), Outbox()
        settings = Settings(mailer=self.outbox, clock_ms=self.clock.now_ms)
        self.users: TestClient[Any, Any] = TestClient(TestServer(create_users(store, settings=settings)))
        orders = create_orders(store, settings=orders_settings)
        self.orders: TestClient[Any, Any] = TestClient(TestServer(orders, port=orders_port))
        self._tokens = Tokens(SigningKeys(store))

    async def __aenter__(self) -> Shop:
        if self._with_users:
            await self.users.start_server()
        await self.orders.start_server()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.users.close()
        await self.orders.close()

    async def customer(self) -> Person:
        return await self._person(Role.CUSTOMER)

    async def staff(self) -> Person:
        return await self._person(Role.STAFF)

    async def _person(self, role: Role) -> Person:
        number = next(_numbers)
        return Person(number, f"{role}{number}@example.com", await self._tokens.issue(number, role))

    async def register(self, role: Role = Role.CUSTOMER) -> Person:
        """Someone with an account, signed in. A role beside that of customers is given as an operator would."""
        email = f"customer{next(_numbers)}@example.com"
        body = {"email": email, "password": PASSWORD, "name": "Ada", "age": 36}
        answer = await self.users.post("/v1/users", json=body)
        assert answer.status == 201, await answer.text()
        if role is not Role.CUSTOMER:
            await self._give_role((await answer.json())["id"], role)
        return await self.sign_in(email)

    async def _give_role(self, user_id: int, role: Role) -> None:
        async def body(txn: kvstore.Transaction) -> None:
            user = await move_role(txn, (await read_user(txn, user_id)).user, role)
            txn.put(user_key(user_id), encode(user))

        await self.store.run_transaction(body)

    async def sign_in(self, email: str, password: str = PASSWORD) -> Person:
        answer = await self.users.post("/v1/sessions", json={"email": email, "password": password})
        assert answer.status == 201, await answer.text()
        session = await answer.json()
        return Person(session["user_id"], email, session["access_token"])

    async def stock(self, staff: Person, sku: str, quantity: int, price: int = 1250, currency: str = "EUR") -> None:
        product = {"name": f"A {sku}", "price": price, "currency": currency}
        answer = await self.orders.put(f"/v1/products/{sku}", json=product, headers=staff.headers)
        assert answer.status in (200, 201), await answer.text()
        if quantity:
            body = {"delta": quantity, "reason": "received"}
            answer = await self.orders.post(f"/v1/products/{sku}/stock", json=body, headers=staff.once())
            assert answer.status == 201, await answer.text()

    async def order(
        self, buyer: Person, lines: dict[str, int], key: str | None = None, ship_to: dict[str, str] | None = None
    ) -> ClientResponse:
        body: dict[str, Any] = {"lines": [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]}
        if ship_to is not None:
            body["ship_to"] = ship_to
        return await self.orders.post("/v1/orders", json=body, headers=buyer.once(key))

    async def on_hand(self, sku: str) -> int:
        return await self._number(f"stock/{sku}/on_hand")

    async def reserved(self, sku: str) -> int:
        return await self._number(f"stock/{sku}/reserved")

    async def _number(self, key: str) -> int:
        record = await self.store.get(key.encode())
        return 0 if record is None else int(record.value)


def plain_headers(answer: ClientResponse) -> dict[str, str]:
    """Without those that no two answers share."""
    return {name: value for name, value in answer.headers.items() if name.lower() not in ("x-request-id", "date")}


async def problem(answer: ClientResponse, status: int, code: str) -> dict[str, Any]:
    """The problem that `answer` must be."""
    body = await answer.text()
    assert answer.status == status, body
    assert answer.content_type == "application/problem+json", body
    found: dict[str, Any] = await answer.json(content_type=None)
    assert found["code"] == code, body
    assert found["status"] == status
    assert found["type"] == f"/problems/{code}"
    assert found["title"]
    assert found["detail"]
    assert found["instance"] == answer.url.path
    assert found["request_id"]
    assert isinstance(found["retryable"], bool)
    assert isinstance(found["errors"], list)
    return found
