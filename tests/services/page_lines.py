"""The command lines of docs/services.md: found, and run as a reader would run them, in a shell with curl.

A line in a ```sh block that a test runs begins with `curl`, goes on for as long as a shell would read on, and ends in a
comment with the status that it must be answered with and what to remember of the answer:

    curl $ORDERS/v1/orders/$ORDER -i --oauth2-bearer $TOKEN        # 200 TOTAL=.total TAG=ETag

`.total` is a field of the body (`.data.0.id` goes deeper), `ETag` a header, `mail:KIND` the token in a mail. A GET
that does not have what is to be remembered yet is sent again until it does, as a reader would. `until X` is for a
stream of events: the line is ended once the event X is in it.

Where there is no curl (a Debian that was just installed has none) `curl_stand_in.py` takes its place.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from tests.cluster.harness import ROOT, until

STAND_IN: Final = Path(__file__).with_name("curl_stand_in.py")
ANSWER_WITHIN_S: Final = 20.0
_BLOCK: Final = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FUNCTION: Final = re.compile(r"^\w+\(\) \{.*$", re.MULTILINE)
_COMMENT: Final = re.compile(r"\s# (?P<status>\d{3})(?P<keep>( [A-Z_]+=\S+)*)( until (?P<event>[a-z_.]+))?$")
_HEADER: Final = re.compile(rb"\AHTTP/1\.1 (\d{3}).*?\r\n\r\n", re.DOTALL)


class Line(Struct, frozen=True):
    """One command of the page. `keep` are variables with where in the answer their values are."""

    number: int
    command: str
    status: int
    keep: dict[str, str]
    event: str

    @property
    def request(self) -> tuple[str, str]:
        """The method, and the URL as it stands there, without its query."""
        words = shlex.split(self.command)
        url = next(word for word in words[1:] if re.match(r"\$[A-Z]", word))
        if "-X" in words:
            method = words[words.index("-X") + 1]
        else:
            method = "POST" if {"--json", "-d"} & set(words) else "GET"
        return method, url.partition("?")[0]


def functions_of(page: str) -> str:
    """The shell functions that the page has its reader define."""
    return "\n".join(_FUNCTION.findall(page))


def lines_of(page: str) -> list[Line]:
    """Raises ValueError for a curl line that does not say how it ends."""
    found: list[Line] = []
    for block in _BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(1)) + 1
        joined, number = "", first
        for offset, text in enumerate(block[1].splitlines()):
            number = number if joined else first + offset
            joined += text
            if joined.endswith("\\") or _in_quotes(joined):
                joined = joined.removesuffix("\\")
                continue
            if joined.startswith("curl "):
                found.append(_line(number, joined))
            joined = ""
    return found


def _in_quotes(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return True
    return False


def _line(number: int, text: str) -> Line:
    comment = _COMMENT.search(text)
    if comment is None:
        raise ValueError(f"line {number} ends in no status: {text}")
    keep = dict(pair.split("=", 1) for pair in comment["keep"].split())
    return Line(number, text[: comment.start()].rstrip(), int(comment["status"]), keep, comment["event"] or "")


class Shell:
    """Runs lines one after the other; `variables` are what they have in common."""

    def __init__(
        self,
        functions: str,
        variables: dict[str, str],
        directory: Path,
        mail: Callable[[str], Awaitable[str]],
        curl: str,
    ) -> None:
        """`curl` is the directory of the real one, or empty for the stand-in. `mail` gives the token of a mail of
        that kind."""
        self._functions = functions
        self._mail = mail
        self.variables = variables
        if not curl:
            curl = str(directory)
            stand_in = directory / "curl"
            stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -S {STAND_IN} "$@"\n')
            stand_in.chmod(0o755)
        # What a reader sees, and a bound.
        (directory / ".curlrc").write_text("silent\nshow-error\ninclude\nmax-time = 30\n")
        self._environment = {"PATH": f"{curl}:{os.defpath}", "CURL_HOME": str(directory), "NO_PROXY": "*"}

    async def run(self, line: Line) -> None:
        """Raises AssertionError, with the line's number, if the answer is not what the page says."""
        waits = line.request[0] == "GET"

        async def answered() -> bool:
            status, headers, body = await self._answer(line)
            said = body.decode(errors="replace")
            assert status == line.status, f"line {line.number} of the page: {line.command}\n{status}: {said}"
            for name, place in line.keep.items():
                is_mail = place.startswith("mail:")
                value = await self._mail(place[5:]) if is_mail else _value(place, headers, body)
                if value is None:
                    assert waits, f"line {line.number} of the page: no {place} in {said}"
                    return False
                self.variables[name] = value
            return True

        await until(answered, ANSWER_WITHIN_S, f"what line {line.number} of the page waits for", poll_s=0.05)

    async def _answer(self, line: Line) -> tuple[int, dict[str, str], bytes]:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f"{self._functions}\nexec {line.command}",
            cwd=ROOT, env={**self._environment, **self.variables},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                if line.event:
                    wanted = f"event: {line.event}\n".encode()
                    output = b""
                    while wanted not in output and (more := await process.stdout.read(65_536)):
                        output += more
                    assert wanted in output, f"line {line.number} of the page: no {line.event} in {output.decode()}"
                else:
                    output, errors = await process.communicate()
                    assert process.returncode == 0, f"line {line.number} of the page: {errors.decode()}"
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        head = _HEADER.match(output)
        assert head is not None, f"line {line.number} of the page: {output[:200]!r}"
        fields = (field.partition(":") for field in head[0].decode().splitlines()[1:] if field)
        return int(head[1]), {name.lower(): value.strip() for name, _, value in fields}, output[head.end() :]


def _value(place: str, headers: dict[str, str], body: bytes) -> str | None:
    if not place.startswith("."):
        return headers.get(place.lower())
    found: Any = msgspec.json.decode(body)
    for name in place[1:].split("."):
        if isinstance(found, list):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = found.get(name) if found is not None else None
    return None if found is None else str(found)
