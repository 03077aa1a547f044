"""Micro-benchmarks of the functions that every request passes through, by pytest-benchmark.

`python -m bench micro` measures them. `make test` runs each of them once, unmeasured, so that they cannot rot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def run(arguments: Sequence[str]) -> int:
    """Measure them all; `arguments` go to pytest (`-k wal`, `--benchmark-json FILE`). Returns its exit code."""
    columns = "--benchmark-columns=min,median,mean,stddev,ops,rounds"
    return int(pytest.main([str(Path(__file__).parent), "--benchmark-enable", columns, "--timeout=600", *arguments]))
