"""What commands share: their options, and running one client call."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

import click

import kvstore
from kvstore.client.client import Client

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


# No letter in it is a short option; click would take it for one.
_NUMBER = re.compile(r"-\.?[0-9][0-9._,eE+-]*")


class NumbersAreArguments(click.Command):
    """A command in which `-5` is an argument though it begins as an option does. Any other unknown option is refused,
    as ever."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        before = args[: args.index("--")] if "--" in args else args
        if any(_NUMBER.fullmatch(arg) for arg in before):
            known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
            for arg in before:
                name = arg.partition("=")[0] if arg.startswith("--") else arg[:2]
                if len(arg) > 1 and arg[0] == "-" and name not in known and not _NUMBER.fullmatch(arg):
                    raise click.NoSuchOption(name, ctx=ctx)
            ctx.ignore_unknown_options = True
        return super().parse_args(ctx, args)


class Size(click.ParamType[int]):
    """Bytes, as a number or with a unit: 500000, 64MiB, 16GiB. The option gets an int."""

    name = "size"
    _UNITS: ClassVar = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        matched = re.fullmatch(r"([0-9]{1,18})\s*([A-Za-z]*)", value.strip())
        if matched is None or matched[2].lower() not in self._UNITS:
            self.fail(f"{value!r} is no size; write bytes, or a number with KiB, MiB, GiB or TiB", param, ctx)
        return int(matched[1]) * self._UNITS[matched[2].lower()]


class Number(click.FloatRange):
    """A number within bounds. nan is within none, though no comparison tells it apart."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


class NodeName(click.ParamType[str]):
    """The name of a node, as far as it can be sent."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail(f"{value!r} is no UTF-8", param, ctx)
        return str(value)


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
        type=Number(0, 3600, min_open=True),
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
