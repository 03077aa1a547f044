"""One run of schemathesis: one service, as one kind of caller."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.harness import ROOT
from tests.fuzz.shops import FuzzedShop

_HERE: Final = Path(__file__).parent
# Whoever may do nothing is refused before anything is read: one pass over all there is to refuse is enough.
_KNOWN_SHARE: Final = 0.7
_ALL_PHASES: Final = "examples,coverage,fuzzing,stateful"
ALL_PHASES: Final = {"nobody": "coverage", "customer": _ALL_PHASES, "staff": _ALL_PHASES, "admin": _ALL_PHASES}


@dataclass(frozen=True, slots=True)
class Effort:
    """`examples` for each operation; with `seconds` the run goes on with others until they are over. `phases` are those
    of schemathesis, for each caller."""

    seed: int
    examples: int
    phases: dict[str, str]
    seconds: int = 0
    time_limit_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Outcome:
    service: str
    who: str
    code: int
    report: str

    @property
    def is_good(self) -> bool:
        return self.code == 0


async def fuzz(shop: FuzzedShop, service: str, who: str, effort: Effort) -> Outcome:
    """`report` is what schemathesis says: of each failure the request, as a curl line, and the answer."""
    config = shop.path / f"{service}-{who}.toml"
    config.write_text((_HERE / "schemathesis.toml").read_text() + _dictionaries(shop.known[service]))
    command = [
        sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())",
        "--config-file", str(config), "--no-color",
        "run", f"{shop.url(service)}/openapi.json",
        "--phases", effort.phases[who], "--max-examples", str(effort.examples), "--seed", str(effort.seed),
        "--continue-on-failure", "--warnings", "off", "--request-timeout", "20",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    for name, value in shop.headers(who).items():
        command += ["--header", f"{name}: {value}"]
    if effort.seconds:
        command += ["--max-time", str(effort.seconds)]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.checks", "COLUMNS": "160"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(effort.seconds + effort.time_limit_s):
            report, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Outcome(service, who, process.returncode, report.decode(errors="replace"))


def _dictionaries(known: dict[str, list[int | str]]) -> str:
    """Configuration by which parameters of the path are often what exists."""
    lines: list[str] = []
    for name, values in known.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines.append("[parameters]")
    lines += [f'"path.{name}" = {{ dictionary = "{name}", probability = {_KNOWN_SHARE} }}' for name in known]
    return "\n".join(["", *lines, ""])


async def fuzz_all(
    shop: FuzzedShop,
    services: tuple[str, ...],
    callers: tuple[str, ...],
    effort: Effort,
    done: Callable[[Outcome], None],
) -> list[Outcome]:
    """The services side by side, each as one caller after the other."""

    async def as_each(service: str) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for who in callers:
            outcomes.append(await fuzz(shop, service, who, effort))
            done(outcomes[-1])
        return outcomes

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(as_each(service)) for service in services]
    return [outcome for task in running for outcome in task.result()]


async def endpoints_by_luck(shop: FuzzedShop, service: str) -> tuple[list[str], list[str]]:
    """Of the documented endpoints those that were never asked, and those that never answered with success."""
    document, answered = await shop.document(service), await shop.answered(service)
    asked = {(method, path) for method, path, _ in answered}
    did = {(method, path) for method, path, status in answered if status < 400}
    there_is = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    return [" ".join(one) for one in there_is if one not in asked], [
        " ".join(one) for one in there_is if one not in did
    ]
