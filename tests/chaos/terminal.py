"""How a campaign goes, on the terminal: one line that is kept up to date, and one for each fault that is over."""

from __future__ import annotations

import asyncio
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tests.chaos.campaign import Campaign
from tests.chaos.faults import Fault
from tests.chaos.meter import Span
from tests.chaos.report import clock, worst
from tests.chaos.schedule import Planned

_REFRESH_S = 0.25


class Terminal:
    """The campaign's `Watcher`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._now_doing = "starting the cluster"
        self._counts: Counter[str] = Counter()

    def planned(self, planned: Planned) -> None:
        self._now_doing = f"#{planned.number} {planned.fault.kind}"

    def struck(self, fault: Fault) -> None:
        self._now_doing += f" ({fault.note})"

    def over(self, span: Span) -> None:
        self._counts[span.kind] += 1
        self._now_doing = "calm"
        held_s = span.ended_at - span.struck_at
        self.console.print(
            f"{clock(span.struck_at):>6}  #{span.number:<4}{span.kind} ({span.note})  held {held_s:.1f} s, no write "
            f"for {span.unavailable_s:.2f} s",
            highlight=False,
        )

    def says(self, text: str) -> None:
        self._now_doing = text
        self.console.print(text, highlight=False)

    async def show(self, campaign: Campaign) -> None:
        """Until it is cancelled. Without a terminal there are only the lines for each fault."""
        if not self.console.is_terminal:
            return
        acknowledged = campaign.meter.acknowledged_at
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            before, per_second = len(acknowledged), 0.0
            while True:
                longest = worst(campaign.spans)
                gap = f"{longest.unavailable_s:.2f} s ({longest.kind})" if longest else "none yet"
                live.update(
                    Text(
                        f"{clock(campaign.now())} of {clock(60 * campaign.options.minutes)}  {per_second:5.0f} ops/s  "
                        f"{len(campaign.spans)} faults, {campaign.leader_kills} leader kills  worst gap {gap}  "
                        f"now: {self._now_doing}",
                        style="bold",
                        no_wrap=True,
                        overflow="ellipsis",
                    ),
                    refresh=True,
                )
                await asyncio.sleep(_REFRESH_S)
                now = len(acknowledged)
                per_second = 0.8 * per_second + 0.2 * (now - before) / _REFRESH_S
                before = now
