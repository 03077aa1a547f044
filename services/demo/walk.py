"""The walk: register, sign in, stock a product, order; kill the leader; read the order, order again; see the node back;
then an order's whole life (`order_life.py`), and at the end the auditor, over the whole store.

It runs against what `make run` starts, leaves nothing behind that a second walk on the same data would stumble over
(each has its own customer; the staff account gets a new random password each time), and every wait has an end.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import aiohttp
import msgspec

import kvstore
from services.demo.cluster import CannotWalk, DevCluster, LocalCluster
from services.demo.order_life import OrderLife
from services.demo.report import Report, Step
from services.demo.shopper import Shopper
from services.users.parts import create_staff
from services.web.tokens import Role

_READY_WITHIN_S: Final = 90.0  # from a cold start, on a busy machine
_BACK_WITHIN_S: Final = 60.0  # `kvstore dev` starts a dead node again after 5 s; the rest is catching up
_POLL_S: Final = 0.1
_TELL_EVERY_S: Final = 2.0  # how often a wait says what it waits for

STAFF_EMAIL: Final = "demo-staff@example.com"
SKU: Final = "demo-cup"
PRICE: Final = 1250
T = TypeVar("T")


async def run_demo(
    endpoints: str, users_url: str, orders_url: str, psp_url: str, data_dir: str, stay: bool, as_json: bool
) -> int:
    """The process's exit code: 0 if the walk passed."""
    report = Report(as_json)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    walk = asyncio.ensure_future(_walk(report, endpoints, users_url, orders_url, psp_url, data_dir))

    def on_signal() -> None:
        stop.set()
        walk.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        await walk
        report.figures.passed = True
    except asyncio.CancelledError:
        report.fail("the walk", "interrupted")
        return 130
    except (CannotWalk, kvstore.KvError, aiohttp.ClientError, TimeoutError) as error:
        report.fail("the walk", str(error) or type(error).__name__)
        return 1
    finally:
        report.end()
    if stay:
        report.say("Ctrl-C stops everything.")
        await stop.wait()
    return 0


async def _walk(report: Report, endpoints: str, users_url: str, orders_url: str, psp_url: str, data_dir: str) -> None:
    async with kvstore.connect(endpoints) as store, aiohttp.ClientSession() as session:
        shopper = Shopper(session, users_url, orders_url)
        cluster = LocalCluster(store, data_dir)
        await _Walk(report, store, shopper, cluster).run(endpoints, users_url, orders_url, psp_url)


class _Walk:
    def __init__(self, report: Report, store: kvstore.Client, shopper: Shopper, cluster: LocalCluster) -> None:
        self._report = report
        self._store = store
        self._shopper = shopper
        self._cluster = cluster

    async def run(self, endpoints: str, users_url: str, orders_url: str, psp_url: str) -> None:
        report, shopper = self._report, self._shopper
        with report.step("wait for store and services") as step:
            whole = await self._until("not ready", self._ready, _READY_WITHIN_S)
            step.detail = f"{len(whole.nodes)} nodes, {(await self._cluster.leader()).name} leads"

        with report.step("staff account, in the store"):
            staff_password = secrets.token_urlsafe(18)
            await self._create_staff(staff_password)
        email, password = f"demo-{secrets.token_hex(4)}@example.com", secrets.token_urlsafe(12)
        with report.step("register a customer") as step:
            user_id = await shopper.register(email, password, "Demo Customer", 36)
            step.detail = f"{email}, user {user_id}"
        with report.step("sign in") as step:
            token = await shopper.sign_in(email, password)
            if (await shopper.read_self(token)).body["id"] != user_id:
                raise CannotWalk("the token is another user's")
            step.detail = "and read oneself"
        staff = await shopper.sign_in(STAFF_EMAIL, staff_password)
        with report.step("stock a product") as step:
            await shopper.put_product(staff, SKU, "A cup", PRICE, "EUR")
            await shopper.add_stock(staff, SKU, 10, "demo delivery")
            on_hand, reserved = await shopper.stock(staff, SKU)
            step.detail = f"{SKU}: {on_hand} on hand, {reserved} reserved"
        key = uuid.uuid4().hex
        with report.step("place an order") as step:
            first = (await shopper.place_order(token, {SKU: 2}, key)).body
            step.detail = f"{first['number']}, {first['state']}, {first['total']} cents"

        await self._lose_the_leader(token, first)

        with report.step("send the first order again") as step:
            again = await shopper.place_order(token, {SKU: 2}, key)
            if not again.replayed or again.body != first:
                raise CannotWalk("the same Idempotency-Key was not answered from its record")
            step.detail = "same key: answered from its record, nothing ordered twice"
        with report.step("count the stock") as step:
            now = await shopper.stock(staff, SKU)
            if now != (on_hand - 3, reserved + 3):
                raise CannotWalk(f"{SKU} has {now} on hand and reserved, not {(on_hand - 3, reserved + 3)}")
            step.detail = f"{now[0]} on hand, {now[1]} reserved: two orders, three cups"
        await OrderLife(report, shopper, token, staff, SKU, PRICE).run()
        with report.step("audit the whole store") as step:
            step.detail = await _audit(endpoints, psp_url)
        self._tell_how_to_go_on(users_url, orders_url, email, password, first["id"])

    async def _lose_the_leader(self, token: str, first: dict[str, object]) -> None:
        report, figures = self._report, self._report.figures
        with report.step("SIGKILL the leader") as step:
            killed = await self._cluster.kill_leader()
            killed_at = time.perf_counter()
            figures.killed = killed.name
            step.detail = f"{killed.name}, process {killed.pid}"

        async def since(action: Awaitable[T]) -> tuple[T, float]:
            return await action, (time.perf_counter() - killed_at) * 1000

        # At the same moment, as buyers do: neither waits for the other, so each time is its own.
        (read, figures.kill_to_read_ms), (placed, figures.kill_to_order_ms) = await asyncio.gather(
            since(self._shopper.read_order(token, int(str(first["id"])))),
            since(self._shopper.place_order(token, {SKU: 1}, uuid.uuid4().hex)),
        )
        if read.body != first:
            raise CannotWalk(f"the order reads back as {read.body}, not as it was placed")
        report.add(
            Step("read the order from the survivors", 0.0, f"{first['number']}, {_times(read.attempts)}"),
            figures.kill_to_read_ms,
        )
        report.add(
            Step("place another order", 0.0, f"{placed.body['number']}, {_times(placed.attempts)}; since the SIGKILL"),
            figures.kill_to_order_ms,
        )
        figures.new_leader = (await self._cluster.leader()).name
        back, applied = await self._until(
            f"{killed.name} is not back", lambda: self._cluster.caught_up(killed), _BACK_WITHIN_S
        )
        figures.kill_to_back_ms = (time.perf_counter() - killed_at) * 1000
        report.add(
            Step(
                "the killed node is back",
                0.0,
                f"{back.name}, process {back.pid}, caught up at entry {applied}; {figures.new_leader} leads",
            ),
            figures.kill_to_back_ms,
        )

    async def _ready(self) -> DevCluster:
        whole = await self._cluster.whole()
        await self._shopper.ready()
        return whole

    async def _create_staff(self, password: str) -> None:
        await create_staff(self._store, STAFF_EMAIL, password, "Demo Staff", 40, Role.STAFF, replace=True)

    async def _until(self, what: str, attempt: Callable[[], Awaitable[T]], within_s: float) -> T:
        """The result of the first `attempt` that does not raise. Raises `CannotWalk` with the last reason."""
        started = told = time.monotonic()
        while True:
            try:
                return await attempt()
            except (CannotWalk, kvstore.KvError) as error:
                now = time.monotonic()
                if now - started > within_s:
                    raise CannotWalk(f"after {within_s:g} s: {what}: {error}") from None
                if now - told > _TELL_EVERY_S:
                    told = now
                    self._report.waiting(what, str(error))
            await asyncio.sleep(_POLL_S)

    def _tell_how_to_go_on(self, users_url: str, orders_url: str, email: str, password: str, order_id: int) -> None:
        say = self._report.say
        say()
        say(f"[bold]users[/]   {users_url}    [bold]orders[/]  {orders_url}    (health: /livez /readyz)")
        say("[bold]Try[/]")
        for line in (
            f"  curl -s {orders_url}/v1/products/{SKU}; curl -s {orders_url}/v1/products/{SKU}/stock",
            f"  TOKEN=$(curl -s {users_url}/v1/sessions -H 'Content-Type: application/json' \\",
            f'    -d \'{{"email":"{email}","password":"{password}"}}\' \\',
            "    | python3 -c 'import json,sys; print(json.load(sys.stdin)[\"access_token\"])')",
            f'  curl -s {users_url}/v1/users/me -H "Authorization: Bearer $TOKEN"',
            f'  curl -s {orders_url}/order/{order_id} -H "Authorization: Bearer $TOKEN"',
            f'  curl -s {orders_url}/v1/orders -H "Authorization: Bearer $TOKEN" \\',
            '    -H "Idempotency-Key: $(date +%s%N)" '
            f'-H \'Content-Type: application/json\' -d \'{{"lines":[{{"sku":"{SKU}","quantity":1}}]}}\'',
            "  python -m services create-staff --email you@example.com     (to put products and stock yourself)",
        ):
            self._report.plain(line)
        say()


async def _audit(endpoints: str, psp_url: str) -> str:
    """What was checked, in a line. Raises `CannotWalk` for a violation."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services", "audit", "--endpoints", endpoints, "--psp-url", psp_url, "--json",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise CannotWalk(f"`python -m services audit` ended with {process.returncode}: {(out or err).decode()[:2000]}")
    found = msgspec.json.decode(out)
    checked = found["checked"]
    return f"{found['checks']} checks, {checked['orders']} orders, the provider's books: no violation"


def _times(attempts: int) -> str:
    return "at the first attempt" if attempts == 1 else f"{attempts} attempts"
