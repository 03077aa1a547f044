"""Which provider a process talks to: the sandbox, or what a deployment names as `module:function`.

Such a function takes an `aiohttp.ClientSession` and gives a `Provider` (`provider.py`); it reads its keys from where
the deployment keeps secrets. The sandbox reads SANDBOX_PSP_API_KEY and SANDBOX_PSP_WEBHOOK_SECRETS, and has fixed ones
for development, as `python -m services sandbox-psp` has.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Final

import aiohttp

from services.payments.provider import Provider
from services.payments.sandbox import SandboxProvider

OpenProvider = Callable[[aiohttp.ClientSession], Provider]

SANDBOX_URL: Final = "http://127.0.0.1:8003"
# What the sandbox has where nothing else is said; it listens on the loopback address only, then.
_DEV_API_KEY: Final = "sk_sandbox"
_DEV_WEBHOOK_SECRET: Final = "whsec_sandbox"


class CannotLoadProvider(Exception):
    """The message says what to do."""


def open_sandbox(session: aiohttp.ClientSession, url: str = SANDBOX_URL) -> Provider:
    api_key = os.environ.get("SANDBOX_PSP_API_KEY") or _DEV_API_KEY
    secrets = os.environ.get("SANDBOX_PSP_WEBHOOK_SECRETS", "").split() or [_DEV_WEBHOOK_SECRET]
    return SandboxProvider(session, url, api_key, secrets)


def load_provider(name: str | None, sandbox_url: str) -> OpenProvider:
    """What opens the provider called `module:function`, or the sandbox at that address. Raises `CannotLoadProvider`."""
    if not name:
        return partial(open_sandbox, url=sandbox_url)
    module, _, function = name.partition(":")
    if not (module and function):
        raise CannotLoadProvider(f"--provider is module:function, not {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CannotLoadProvider(f"cannot load the provider {name}: {error}") from None
    if not callable(found):
        raise CannotLoadProvider(f"{name} cannot be called with an HTTP client to give a provider")
    opened: OpenProvider = found
    return opened
