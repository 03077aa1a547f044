"""Who waits for what on one channel: calls for one frame each, watches for as many as come."""

from __future__ import annotations

from typing import Protocol

from kvstore.codec import ClientFrame, ServerFrame, Watch, WatchEvents, Watching, WatchProgress


class Sink(Protocol):
    """Who waits for the answer to one frame; to a `Watch`, for all that follows from it."""

    def on_frame(self, frame: ServerFrame) -> None: ...

    def on_lost(self) -> None:
        """The channel is gone; whether the node saw the frame is not known."""


class Sinks:
    __slots__ = ("calls", "watches")

    def __init__(self) -> None:
        self.calls: dict[int, Sink] = {}
        self.watches: dict[int, Sink] = {}

    def add(self, frame: ClientFrame, sink: Sink) -> None:
        if type(frame) is Watch:
            self.watches[frame.id] = sink
        else:
            self.calls[frame.id] = sink

    def forget(self, frame_id: int) -> None:
        if self.calls.pop(frame_id, None) is None:
            self.watches.pop(frame_id, None)

    def deliver(self, frame: ServerFrame) -> bool:
        """Hand a frame to its sink; False if nobody waits for it."""
        sink = self.calls.pop(frame.id, None)
        if sink is None and self.watches:
            if type(frame) is WatchProgress:
                for watch in tuple(self.watches.values()):
                    watch.on_frame(frame)
                return True
            goes_on = type(frame) is WatchEvents or type(frame) is Watching
            sink = self.watches.get(frame.id) if goes_on else self.watches.pop(frame.id, None)
        if sink is None:
            return False
        sink.on_frame(frame)
        return True

    def lose(self) -> None:
        """The channel is gone."""
        sinks = [*self.calls.values(), *self.watches.values()]
        self.calls, self.watches = {}, {}
        for sink in sinks:
            sink.on_lost()
