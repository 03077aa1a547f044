"""What commands share: their options, and running one client call."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click

import kvstore
from kvstore.client.client import Client

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Connection:
    """How a command reaches its cluster."""

    def __init__(self, endpoints: str, timeout_s: float) -> None:
        self.endpoints = endpoints
        self.timeout_s = timeout_s

    def client(self) -> Client:
        try:
            return kvstore.connect(self.endpoints, timeout_s=self.timeout_s)
        except ValueError as error:
            raise click.UsageError(f"--endpoints: {error}") from None

    def call(self, use: Callable[[Client], Awaitable[T]]) -> T:
        """Run `use` with a client on a loop of its own, and close the client."""

        async def with_client() -> T:
            async with self.client() as client:
                return await use(client)

        return asyncio.run(with_client())


def connection_options(command: F) -> F:
    """Adds --endpoints and --timeout; the command gets them as `connection`."""

    @click.option(
        "--endpoints",
        envvar="KVSTORE_ENDPOINTS",
        default="127.0.0.1:7421",
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT,…",
        help="Client addresses of the cluster; one that answers is enough.",
    )
    @click.option(
        "--timeout",
        type=click.FloatRange(0, 3600, min_open=True),
        default=5.0,
        show_default=True,
        metavar="SECONDS",
        help="Give up after this long.",
    )
    @functools.wraps(command)
    def with_connection(*args: Any, endpoints: str, timeout: float, **kwargs: Any) -> Any:
        return command(*args, connection=Connection(endpoints, timeout), **kwargs)

    return with_connection  # type: ignore[return-value]


def output_option(command: F) -> F:
    """Adds --output; the command gets `output`."""
    return click.option(
        "--output",
        "-o",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="For people, or for programs: one JSON document.",
    )(command)


def encoding_option(command: F) -> F:
    """Adds --encoding; the command gets `encoding`."""
    return click.option(
        "--encoding",
        type=click.Choice(["utf8", "hex", "base64"]),
        default="utf8",
        show_default=True,
        help="How keys and values are written, in arguments and in results. Results that are no UTF-8 are given "
        "in base64, and say so.",
    )(command)
