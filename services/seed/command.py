"""`python -m services seed`: loads a seed with a progress bar, and says what can be done with it."""

from __future__ import annotations

import time

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvstore
from services.seed.load import can_sign_in, load_products, load_users
from services.seed.people import user


class Summary(Struct, frozen=True):
    """What `--json` prints. `email` and `password` are of the first customer; null where there are no users, or where
    that account was there with another password."""

    seed: int
    products_created: int
    products_existing: int
    users_created: int
    users_existing: int
    duration_s: float
    email: str | None
    password: str | None


async def run_seed(endpoints: str, products: int, users: int, seed: int, password: str, as_json: bool) -> None:
    """Raises `KvError`, `Problem`."""
    started = time.perf_counter()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with kvstore.connect(endpoints) as store:
        with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
            shown = bar.add_task("products", total=products), bar.add_task("users", total=users)
            catalogue = await load_products(store, seed, products, lambda count: bar.advance(shown[0], count))
            people = await load_users(store, seed, users, password, lambda count: bar.advance(shown[1], count))
        email = user(seed, 1, password).account.email if users else None
        if email is not None and not await can_sign_in(store, email, password):
            email = None
    summary = Summary(
        seed,
        catalogue.created,
        catalogue.existing,
        people.created,
        people.existing,
        round(time.perf_counter() - started, 2),
        email,
        password if email is not None else None,
    )
    if as_json:
        print(msgspec.json.encode(summary).decode(), flush=True)
    else:
        _tell(summary, users)


def _tell(summary: Summary, users: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[green]✓[/] [bold]{summary.products_created}[/] products ({summary.products_existing} were there), "
        f"[bold]{summary.users_created}[/] users ({summary.users_existing} were there), in {summary.duration_s:.1f} s"
    )
    if summary.email is not None:
        console.print("  All these users share one password: they are to try things with, nothing else. Sign in:")
        body = msgspec.json.encode({"email": summary.email, "password": summary.password}).decode()
        command = f"curl -s http://127.0.0.1:8001/v1/sessions -H 'Content-Type: application/json' -d '{body}'"
        console.print(f"    {command}", markup=False)
    elif users:
        console.print("  The accounts that were there keep the password that they had; this is not theirs.")
    console.print("  Look: curl -s 'http://127.0.0.1:8002/v1/products?q=tea&in_stock=true'", markup=False)
