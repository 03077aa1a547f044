"""A postal address as clients send it: of an account's list, or of an order."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from services.web.bodies import Name, RequestBody
from services.web.problems import field_problem

# ISO 3166-1, as of 2024.
_CODES: Final = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA CC
CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD
GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH
KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW
MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC
SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY
UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
"""
_COUNTRIES: Final = frozenset(_CODES.split())

# The characters of `Name`, or nothing.
_Optional = Annotated[str, Meta(max_length=200, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z")]


class AddressInput(RequestBody, frozen=True):
    name: Annotated[Name, Meta(examples=["Ada"])]
    line1: Annotated[Name, Meta(examples=["12 Bell Yard"])]
    city: Annotated[Name, Meta(examples=["London"])]
    country: Annotated[
        str,
        Meta(
            pattern=r"\A[A-Z]{2}\Z",
            description="ISO 3166-1, two letters.",
            examples=["GB"],
            extra_json_schema={"enum": sorted(_COUNTRIES)},
        ),
    ]
    line2: _Optional = ""
    postal_code: Annotated[str, Meta(max_length=20, pattern=r"\A[A-Za-z0-9 -]*\Z", examples=["WC2A 2JR"])] = ""
    region: _Optional = ""
    phone: Annotated[
        str, Meta(max_length=32, pattern=r"\A(\+?[0-9][0-9 ()./-]{3,})?\Z", examples=["+44 20 7946 0018"])
    ] = ""


def check_country(given: AddressInput, pointer: str = "") -> None:
    """`pointer` is where the address stands in the body. Raises `Problem` `invalid_body`."""
    if given.country not in _COUNTRIES:
        raise field_problem(f"{pointer}/country", "invalid_value", "This is no country of ISO 3166-1")
