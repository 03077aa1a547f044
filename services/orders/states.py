"""The state machines of an order and of what belongs to it, as tables: what is not in them cannot happen.

`docs/services.md` shows these very tables; it is generated from them. An event that a table does not lead on from a
state is refused with `Problem` `order_state`, which names the state. Guards and effects are words for people: they say
what the transaction that makes the step checks and writes (`draft.py`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from services.web.problems import Problem

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class Transition(NamedTuple, Generic[State, Event]):
    """From `source` (None: there is nothing yet) `event` leads to `target`."""

    source: State | None
    event: Event
    target: State
    guard: str = ""
    effects: str = ""


class StateMachine(Generic[State, Event]):
    """`noun` is what it is the machine of, as people call it."""

    def __init__(self, noun: str, *transitions: Transition[State, Event]) -> None:
        self.noun = noun
        self.transitions: Final = transitions
        self._targets = {(step.source, step.event): step.target for step in transitions}
        assert len(self._targets) == len(transitions), f"two transitions of one {noun} begin alike"

    def allows(self, source: State | None, event: Event) -> bool:
        return (source, event) in self._targets

    def next(self, source: State | None, event: Event) -> State:
        """Where `event` leads. Raises `Problem` `order_state` if nowhere."""
        target = self._targets.get((source, event))
        if target is None:
            what = f"A {self.noun}" if self.noun[0] not in "aeio" else f"An {self.noun}"
            raise Problem("order_state", f"{what} that is {source or 'not there'} cannot {event.replace('_', ' ')}")
        return target


# --- the order --------------------------------------------------------------------------------------------------------


class OrderState(StrEnum):
    PENDING_PAYMENT = "pending_payment"
    CONFIRMED = "confirmed"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class OrderEvent(StrEnum):
    PLACE = "place"
    PAY = "be_paid"
    EXPIRE = "expire"
    CANCEL = "be_cancelled"
    SETTLE = "be_settled"
    COMPLETE = "complete"


_O, _OE = OrderState, OrderEvent
ORDER: Final = StateMachine(
    "order",
    Transition(
        None, _OE.PLACE, _O.PENDING_PAYMENT,
        "products and cart are as they were read, stock suffices",
        "stock moves from on hand to reserved; prices are frozen; the cart is ordered; expiry is due",
    ),
    Transition(
        _O.PENDING_PAYMENT, _OE.PAY, _O.CONFIRMED,
        "authorised, or captured, is at least the total",
        "stock moves from reserved to allocated; expiry is off",
    ),
    Transition(
        _O.PENDING_PAYMENT, _OE.EXPIRE, _O.EXPIRED,
        "it is time, and no payment is in flight",
        "stock moves from reserved to on hand",
    ),
    Transition(
        _O.PENDING_PAYMENT, _OE.CANCEL, _O.CANCELLING, "", "a void is due where something is held",
    ),
    Transition(
        _O.CONFIRMED, _OE.CANCEL, _O.CANCELLING,
        "nothing is shipped", "a void or a refund is due",
    ),
    Transition(
        _O.CANCELLING, _OE.SETTLE, _O.CANCELLED,
        "nothing is held, and what was captured is refunded", "stock moves back to on hand",
    ),
    Transition(
        _O.CONFIRMED, _OE.COMPLETE, _O.COMPLETED,
        "every line is delivered or cancelled, the balance is 0, no refund is pending", "",
    ),
)  # fmt: skip


# --- a payment attempt ------------------------------------------------------------------------------------------------


class PaymentState(StrEnum):
    CREATED = "created"
    AUTHORISING = "authorising"
    UNKNOWN = "unknown"
    REQUIRES_ACTION = "requires_action"
    AUTHORISED = "authorised"
    CAPTURING = "capturing"
    PARTIALLY_CAPTURED = "partially_captured"
    CAPTURED = "captured"
    VOIDING = "voiding"
    VOIDED = "voided"
    FAILED = "failed"


class PaymentEvent(StrEnum):
    CREATE = "be_created"
    SEND = "be_sent"
    LOSE = "be_lost"
    ASK = "ask_the_customer"
    AUTHORISE = "be_authorised"
    DECLINE = "be_declined"
    WITHDRAW = "be_withdrawn"
    CAPTURE = "be_captured"
    TAKE_PART = "be_taken_in_part"
    TAKE_ALL = "be_taken"
    REFUSE = "be_refused"
    REFUSE_REST = "be_refused_the_rest"
    VOID = "be_voided"
    END = "be_given_up"


_P, _PE = PaymentState, PaymentEvent
PAYMENT: Final = StateMachine(
    "payment",
    Transition(
        None, _PE.CREATE, _P.CREATED,
        "the order waits for payment, and has no live one", "the request's key is stored; the payment's step is due",
    ),
    Transition(_P.CREATED, _PE.SEND, _P.AUTHORISING, "", "from now on the provider may have it"),
    Transition(_P.CREATED, _PE.WITHDRAW, _P.FAILED, "it was never sent", "so that a late step sends nothing"),
    Transition(_P.AUTHORISING, _PE.LOSE, _P.UNKNOWN, "the provider did not answer", "it is asked what became of it"),
    Transition(_P.AUTHORISING, _PE.ASK, _P.REQUIRES_ACTION, "", "the customer has to open a page of the provider"),
    Transition(_P.UNKNOWN, _PE.ASK, _P.REQUIRES_ACTION),
    Transition(_P.AUTHORISING, _PE.AUTHORISE, _P.AUTHORISED, "", "order and stock follow; capture is due if automatic"),
    Transition(_P.UNKNOWN, _PE.AUTHORISE, _P.AUTHORISED),
    Transition(_P.REQUIRES_ACTION, _PE.AUTHORISE, _P.AUTHORISED),
    Transition(_P.AUTHORISING, _PE.DECLINE, _P.FAILED, "", "another attempt is possible"),
    Transition(_P.UNKNOWN, _PE.DECLINE, _P.FAILED),
    Transition(_P.REQUIRES_ACTION, _PE.DECLINE, _P.FAILED),
    Transition(_P.AUTHORISED, _PE.CAPTURE, _P.CAPTURING, "the order is confirmed, no more than was authorised"),
    Transition(_P.PARTIALLY_CAPTURED, _PE.CAPTURE, _P.CAPTURING),
    Transition(_P.CAPTURING, _PE.TAKE_PART, _P.PARTIALLY_CAPTURED),
    Transition(_P.CAPTURING, _PE.TAKE_ALL, _P.CAPTURED, "", "if the order is not confirmed any more: a refund is due"),
    Transition(_P.CAPTURING, _PE.REFUSE, _P.AUTHORISED, "nothing was captured before", "the order needs attention"),
    Transition(_P.CAPTURING, _PE.REFUSE_REST, _P.PARTIALLY_CAPTURED, "", "the order needs attention"),
    Transition(_P.REQUIRES_ACTION, _PE.VOID, _P.VOIDING, "the order is cancelled, or expires"),
    Transition(_P.AUTHORISED, _PE.VOID, _P.VOIDING, "the order is not wanted any more"),
    Transition(_P.VOIDING, _PE.END, _P.VOIDED, "", "a cancelling order may be settled"),
    Transition(
        _P.VOIDING, _PE.TAKE_ALL, _P.CAPTURED, "it was captured at the provider, not by us", "a refund is due",
    ),
    Transition(_P.VOIDING, _PE.TAKE_PART, _P.PARTIALLY_CAPTURED, "the same, of a part", "a refund is due"),
)  # fmt: skip

# What the provider may be doing, or holds or has taken for us: an order has one such payment at most.
LIVE: Final = frozenset(_P) - {_P.VOIDED, _P.FAILED}
# Money was taken.
TAKEN: Final = frozenset({_P.CAPTURED, _P.PARTIALLY_CAPTURED})
# Nobody knows yet how these end.
IN_FLIGHT: Final = frozenset({_P.CREATED, _P.AUTHORISING, _P.UNKNOWN, _P.REQUIRES_ACTION, _P.CAPTURING, _P.VOIDING})


# --- refunds, shipments, returns --------------------------------------------------------------------------------------


class RefundState(StrEnum):
    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SETTLED_OUTSIDE = "settled_outside"


class RefundEvent(StrEnum):
    ASK = "be_asked_for"
    SUCCEED = "succeed"
    FAIL = "fail"
    SETTLE_OUTSIDE = "be_settled_outside"


REFUND: Final = StateMachine(
    "refund",
    Transition(
        None, RefundEvent.ASK, RefundState.PENDING,
        "with all others it is no more than was captured", "the request's key is stored; the refund's step is due",
    ),
    Transition(RefundState.PENDING, RefundEvent.SUCCEED, RefundState.SUCCEEDED),
    Transition(RefundState.PENDING, RefundEvent.FAIL, RefundState.FAILED, "", "the order needs attention"),
    Transition(
        RefundState.FAILED, RefundEvent.SETTLE_OUTSIDE, RefundState.SETTLED_OUTSIDE,
        "no other refund has given it back", "it counts as refunded; a cancelling order may be settled",
    ),
)  # fmt: skip


class ShipmentState(StrEnum):
    SHIPPED = "shipped"
    DELIVERED = "delivered"


class ShipmentEvent(StrEnum):
    SHIP = "be_shipped"
    DELIVER = "be_delivered"


SHIPMENT: Final = StateMachine(
    "shipment",
    Transition(
        None, ShipmentEvent.SHIP, ShipmentState.SHIPPED,
        "the order is confirmed and paid, the goods are still to be shipped", "stock leaves allocated",
    ),
    Transition(ShipmentState.SHIPPED, ShipmentEvent.DELIVER, ShipmentState.DELIVERED, "", "the order may be complete"),
)  # fmt: skip


class ReturnState(StrEnum):
    REQUESTED = "requested"
    APPROVED = "approved"
    REJECTED = "rejected"
    RECEIVED = "received"


class ReturnEvent(StrEnum):
    REQUEST = "be_requested"
    APPROVE = "be_approved"
    REJECT = "be_rejected"
    RECEIVE = "be_received"


RETURN: Final = StateMachine(
    "return",
    Transition(
        None, ReturnEvent.REQUEST, ReturnState.REQUESTED, "the goods are delivered, and in no other open return",
    ),
    Transition(ReturnState.REQUESTED, ReturnEvent.APPROVE, ReturnState.APPROVED),
    Transition(ReturnState.REQUESTED, ReturnEvent.REJECT, ReturnState.REJECTED),
    Transition(
        ReturnState.APPROVED, ReturnEvent.RECEIVE, ReturnState.RECEIVED,
        "", "what is restocked is on hand again; a refund is due",
    ),
)  # fmt: skip

MACHINES: Final = (ORDER, PAYMENT, REFUND, SHIPMENT, RETURN)
