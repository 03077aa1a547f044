"""What the auditor checks, and what it finds.

A check has a stable code and says in its docstring what it proves. It is a function of one subject (an order with
everything that belongs to it, a product, a cart) that yields a `Difference` for each thing that is not as it must be;
it computes what must be from the records alone, and never by the code of the services that wrote them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Generic, NamedTuple, TypeVar

from msgspec import Struct

# Of one code; the rest are counted. Whoever has more of one kind than this looks for its one cause.
KEPT_OF_CODE_MAX: Final = 50
# Of what was expected and what was found: a line of a terminal, or two.
TEXT_CHARS_MAX: Final = 300

T = TypeVar("T")


class Difference(NamedTuple):
    """At `key` of the store (or of the provider's books)."""

    key: bytes
    expected: object
    found: object


class Violation(Struct, frozen=True):
    code: str
    key: str
    expected: str
    found: str


# Code to what it proves, of all checks that were declared.
CODES: Final[dict[str, str]] = {}


def declare(code: str, proves: str) -> str:
    """For what is found on the way, by no function of its own. The same code may be declared by several that prove
    parts of one thing; the first says what that is."""
    CODES.setdefault(code, " ".join(proves.split()))
    return code


class Checks(Generic[T]):
    """Those of one kind of subject."""

    def __init__(self) -> None:
        self._checks: list[tuple[str, Callable[[T], Iterable[Difference]]]] = []

    def __call__(
        self, code: str
    ) -> Callable[[Callable[[T], Iterable[Difference]]], Callable[[T], Iterable[Difference]]]:
        def add(function: Callable[[T], Iterable[Difference]]) -> Callable[[T], Iterable[Difference]]:
            proves = inspect.getdoc(function)
            assert proves, f"{code} does not say what it proves"
            declare(code, proves)
            self._checks.append((code, function))
            return function

        return add

    def run(self, subject: T, findings: Findings) -> None:
        for code, differences in self._checks:
            for difference in differences(subject):
                findings.add(code, *difference)


class Findings:
    """The violations of one run; a bounded number of them in full."""

    def __init__(self) -> None:
        self.kept: list[Violation] = []
        self.counts: Counter[str] = Counter()

    def add(self, code: str, key: bytes, expected: object, found: object) -> None:
        assert code in CODES, code
        self.counts[code] += 1
        if self.counts[code] <= KEPT_OF_CODE_MAX:
            name = key.decode(errors="backslashreplace")
            self.kept.append(Violation(code, name, _text(expected), _text(found)))

    @property
    def total(self) -> int:
        return self.counts.total()


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}…"
