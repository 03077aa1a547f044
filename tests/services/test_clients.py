"""Whose request it is: addresses behind proxies."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from services.web.clients import TRUSTED_PROXIES, client_address, counted_address, parse_network, user_agent


def request_from(remote: str, *forwarded: str, agent: str = "") -> web.Request:
    app = web.Application()
    app[TRUSTED_PROXIES] = (parse_network("10.0.0.0/8"), parse_network("2001:db8:ffff::/48"))
    headers = [("X-Forwarded-For", value) for value in forwarded] + [("User-Agent", agent)]
    request = make_mocked_request("GET", "/", headers=dict(headers), app=app)  # type: ignore[arg-type]
    return request.clone(remote=remote)


@pytest.mark.parametrize(
    ("remote", "forwarded", "address"),
    [
        ("203.0.113.7", "", "203.0.113.7"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),  # anybody can write that
        ("127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("::1", "2001:db8::1", "2001:db8::1"),
        ("10.1.2.3", "198.51.100.1", "198.51.100.1"),
        ("2001:db8:ffff::5", "198.51.100.1", "198.51.100.1"),
        ("10.1.2.3", "192.0.2.66, 198.51.100.1", "198.51.100.1"),  # the first was written by the client
        ("10.1.2.3", "198.51.100.1, 10.9.9.9", "198.51.100.1"),
        ("10.1.2.3", "10.9.9.8, 10.9.9.9", "10.9.9.8"),
        ("10.1.2.3", "unknown", "10.1.2.3"),
        ("10.1.2.3", ",", "10.1.2.3"),
        ("10.1.2.3", "198.51.100.1, x, 10.9.9.9", "10.9.9.9"),
        ("127.0.0.1", "::ffff:198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "fe80::1%eth0", "fe80::1"),
    ],
)
def test_the_address_of_a_client(remote: str, forwarded: str, address: str) -> None:
    given = request_from(remote, forwarded) if forwarded else request_from(remote)
    assert client_address(given) == address


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("127.0.0.1", None),
        ("::1", None),
        ("", None),
    ],
)
def test_what_stands_for_an_address(address: str, counted: str | None) -> None:
    assert counted_address(address) == counted


def test_what_a_client_calls_itself_is_short_and_printable() -> None:
    assert user_agent(request_from("127.0.0.1", agent="a\u009f\u202eb" + "x" * 500)) == "a??b" + "x" * 196
