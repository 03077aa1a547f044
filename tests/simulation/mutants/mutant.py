"""How a mutant is made: one rule of the product taken out, from outside, and put back afterwards.

A mutant proves that the checks can fail: a run with it must end in a violation. It changes classes and modules of the
product while `applied` lasts; whatever is built meanwhile (nodes boot inside of it) works by the changed rules.

Most are written as the edit that somebody might make by mistake: `Patches.rewrite` takes a function's source, replaces
a passage that must stand in it exactly once, and compiles it in its module again. So a mutant stays the smallest change
that removes its rule, and one whose passage is no longer there fails loudly (`Outdated`) instead of doing nothing.

What it does not do: choose faults, run anything, or mix with another mutant.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple


class Outdated(Exception):
    """The product's code is not what this mutant was made for: look at the rule anew, then at the mutant."""


class Patches:
    """Changes to classes and modules, taken back by `undo` in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: type | ModuleType, name: str, value: Any) -> None:
        """`owner.name` is `value` for now."""
        if name not in vars(owner):
            raise Outdated(f"{owner.__name__} has no {name} of its own any more")
        self._undo.append(partial(setattr, owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def override(self, owner: type, name: str, value: Any) -> None:
        """The same for what `owner` inherits."""
        if name in vars(owner) or not hasattr(owner, name):
            raise Outdated(f"{owner.__name__} does not inherit {name} any more")
        self._undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    def rewrite(
        self, owner: type | ModuleType, name: str, *changes: tuple[str, str], also: tuple[ModuleType, ...] = ()
    ) -> None:
        """Replace passages of a function, a method or a property's getter. Each must stand in it exactly once; lines
        of a passage are written as they stand in the function, indented from its `def`. `also`: modules that hold the
        function under the same name."""
        kept = vars(owner).get(name)
        if kept is None:
            raise Outdated(f"{owner.__name__} has no {name} of its own any more")
        function = _function_of(kept)
        changed = _wrap_like(kept, _rewritten(function, changes, f"{owner.__name__}.{name}"))
        for place in (owner, *also):
            self.replace(place, name, changed)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _function_of(kept: Any) -> FunctionType:
    function = kept.fget if isinstance(kept, property) else getattr(kept, "__func__", kept)
    assert isinstance(function, FunctionType), kept
    return function


def _wrap_like(kept: Any, function: FunctionType) -> Any:
    if isinstance(kept, property):
        return property(function)
    if isinstance(kept, (staticmethod, classmethod)):
        return type(kept)(function)
    return function


def _rewritten(function: FunctionType, changes: tuple[tuple[str, str], ...], what: str) -> FunctionType:
    source = textwrap.dedent(inspect.getsource(function))
    begins = re.search(r"^(async )?def ", source, re.MULTILINE)
    assert begins is not None
    source = source[begins.start() :]  # without its decorators
    for old, new in changes:
        if source.count(old) != 1:
            raise Outdated(f"{what} holds this passage {source.count(old)} times, not once: {old!r}")
        source = source.replace(old, new)
    free = function.__code__.co_freevars
    if free not in ((), ("__class__",)):
        raise Outdated(f"{what} is a closure over {free}")
    indented = textwrap.indent(source, "    ")
    maker = f"def make(__class__):\n{indented}\n    return {function.__name__}\n"
    code = compile("from __future__ import annotations\n" + maker, f"<mutant of {what}>", "exec", dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    owner = function.__closure__[0].cell_contents if function.__closure__ else None
    changed = made["make"](owner)
    assert isinstance(changed, FunctionType)
    return changed


class Mutant(NamedTuple):
    """One rule taken out. `rule` is its id in docs/raft.md; `nodes` are the sizes of the clusters in which the rule
    matters, taken in turn by seed; `without` are the kinds of fault that such a cluster cannot have."""

    name: str
    rule: str
    description: str
    patch: Callable[[Patches], None]
    nodes: tuple[int, ...] = (3, 5)
    without: tuple[str, ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        patches = Patches()
        try:
            self.patch(patches)
            yield
        finally:
            patches.undo()

    def nodes_for(self, seed: int) -> int:
        """The size of the cluster in the run of this seed."""
        return self.nodes[(seed + 1) % len(self.nodes)]


class Catalogue:
    """Collects mutants as they are declared, one function each: its docstring says what the mutant does."""

    def __init__(self) -> None:
        self.mutants: list[Mutant] = []

    def mutant(
        self, rule: str, *, nodes: tuple[int, ...] = (3, 5), without: tuple[str, ...] = ()
    ) -> Callable[[Callable[[Patches], None]], Callable[[Patches], None]]:
        """The decorated function is the patch; the mutant's name is the function's."""

        def declare(patch: Callable[[Patches], None]) -> Callable[[Patches], None]:
            description = " ".join((patch.__doc__ or "").split())
            assert description, f"{patch.__name__} does not say what it does"
            self.mutants.append(Mutant(patch.__name__, rule, description, patch, nodes, without))
            return patch

        return declare
