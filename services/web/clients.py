"""Where a request comes from: the client's address behind proxies, and its name for itself.

A proxy that is trusted says in `X-Forwarded-For` whom it speaks for; anybody else could write anything there. Trusted
are this machine's own addresses (by default a service listens on them only, behind a proxy that has TLS) and the
networks that the deployment names. From the right, the first address that is no trusted proxy is the client's.
"""

from __future__ import annotations

import ipaddress
from typing import Final

from aiohttp import web

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TRUSTED_PROXIES: Final = web.AppKey("trusted_proxies", tuple)
_HOPS_MAX: Final = 16  # more proxies in a row than any deployment has
_AGENT_CHARS_MAX: Final = 200  # browsers' are some 120


def parse_network(text: str) -> Network:
    """Raises ValueError."""
    return ipaddress.ip_network(text, strict=False)


def client_address(request: web.Request) -> str:
    """The client's address; empty where there is none (a socket of another kind)."""
    address = request.remote or ""
    if "X-Forwarded-For" not in request.headers:
        return address
    hops = ",".join(request.headers.getall("X-Forwarded-For")).split(",")
    proxies = request.app[TRUSTED_PROXIES]
    for hop in reversed(hops[-_HOPS_MAX:]):
        parsed = _parse(hop.strip())
        if parsed is None or not _is_trusted(address, proxies):
            break
        address = str(parsed)
    return address


def counted_address(address: str) -> str | None:
    """What stands for an address where its requests are counted: the /64 of an IPv6 one, because one customer has so
    many of them. None for this machine's own: that is a proxy which does not say for whom it asks, and counting it
    would shut everyone out together."""
    parsed = _parse(address)
    if parsed is None or parsed.is_loopback:
        return None
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False).network_address)
    return str(parsed)


def user_agent(request: web.Request) -> str:
    """What the client calls itself, printable and short. Whoever reads it reads what a stranger wrote."""
    text = request.headers.get("User-Agent", "")[:_AGENT_CHARS_MAX]
    return "".join(character if character.isprintable() else "?" for character in text)


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _is_trusted(address: str, proxies: tuple[Network, ...]) -> bool:
    parsed = _parse(address)
    return parsed is not None and (parsed.is_loopback or any(parsed in network for network in proxies))
