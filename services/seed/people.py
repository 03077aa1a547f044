"""Customers of a seed, with their postal addresses. The same seed makes the same ones.

Their mail goes nowhere: `example.com` is reserved (RFC 2606).
"""

from __future__ import annotations

import random
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

from services.orders.products import words_of
from services.seed.products import tag_of
from services.users.bodies import Registration
from services.web.addresses import AddressInput

_ADDRESSES: Final = (1, 1, 1, 2, 2, 3)


class Place(NamedTuple):
    """A country and its people: in streets `{}` is the house's number, in codes `#` is a digit and `@` a letter."""

    country: str
    first_names: str
    last_names: str
    streets: str
    cities: str
    postal_code: str
    phone: str


_PLACES: Final = (
    Place(
        "DE", "Anna Lukas Mia Jonas Emma Paul Hannah Felix Lena Jürgen Käthe Moritz",
        "Müller Schmidt Schneider Fischer Weber Wagner Becker Hoffmann Schäfer Krüger",
        "Lindenstraße {}|Hauptstraße {}|Am Markt {}|Gartenweg {}|Schillerstraße {}",
        "Berlin|Hamburg|Köln|Leipzig|Freiburg|Kassel", "1####", "+49 30 ######",
    ),
    Place(
        "FR", "Camille Louis Chloé Hugo Inès Jules Zoé Léo Manon Théo Élise Noé",
        "Martin Bernard Dubois Moreau Laurent Lefèvre Garnier Faure Rousseau Mercier",
        "{} rue de la Gare|{} avenue Victor Hugo|{} place du Marché|{} rue des Lilas",
        "Paris|Lyon|Nantes|Lille|Toulouse|Rennes", "7####", "+33 1 ## ## ## ##",
    ),
    Place(
        "GB", "Olivia George Amelia Harry Isla Jack Grace Oscar Freya Arthur Ruby Alfie",
        "Smith Jones Taylor Brown Wilson Evans Thomas Walker Wright Clarke",
        "{} High Street|{} Church Lane|{} Station Road|{} Mill Close|{} Queens Avenue",
        "London|Leeds|Bristol|York|Norwich|Cardiff", "@@# #@@", "+44 20 #### ####",
    ),
    Place(
        "ES", "Lucía Hugo Sofía Mateo Martina Leo Paula Álvaro Carmen Diego Elena Iñigo",
        "García Fernández González López Martínez Sánchez Pérez Gómez Ruiz Núñez",
        "Calle Mayor {}|Calle del Sol {}|Avenida de América {}|Plaza Nueva {}",
        "Madrid|Sevilla|Bilbao|Valencia|Granada|Málaga", "2####", "+34 91 ### ####",
    ),
    Place(
        "IT", "Giulia Leonardo Sofia Francesco Aurora Lorenzo Alice Matteo Chiara Niccolò",
        "Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco",
        "Via Roma {}|Via Garibaldi {}|Corso Italia {}|Piazza del Popolo {}",
        "Roma|Milano|Torino|Bologna|Firenze|Napoli", "4####", "+39 06 ### ####",
    ),
    Place(
        "NL", "Emma Daan Julia Sem Sanne Lars Fleur Bram Lotte Thijs",
        "Jansen Bakker Visser Smit Meijer Mulder Bos Vos Peters Hendriks",
        "Kerkstraat {}|Dorpsstraat {}|Molenweg {}|Keizersgracht {}",
        "Amsterdam|Utrecht|Groningen|Delft|Haarlem", "1### @@", "+31 20 ### ####",
    ),
    Place(
        "SE", "Alice Lucas Maja William Elsa Oskar Åsa Björn Saga Nils",
        "Andersson Johansson Karlsson Nilsson Lindqvist Öberg Svensson Berglund Sjöström Åkesson",
        "Storgatan {}|Skolgatan {}|Kungsgatan {}|Björkvägen {}",
        "Stockholm|Göteborg|Malmö|Uppsala|Umeå", "1## ##", "+46 8 ### ## ##",
    ),
    Place(
        "PL", "Zofia Antoni Julia Jan Maja Stanisław Hanna Łukasz Zuzanna Piotr",
        "Nowak Kowalski Wiśniewski Wójcik Kamiński Lewandowski Zieliński Woźniak Mazur Krawczyk",
        "ul. Polna {}|ul. Długa {}|ul. Szkolna {}|al. Niepodległości {}",
        "Warszawa|Kraków|Gdańsk|Wrocław|Poznań", "0#-###", "+48 22 ### ## ##",
    ),
)  # fmt: skip


class SeedUser(Struct, frozen=True):
    account: Registration
    addresses: tuple[AddressInput, ...]


def user(seed: int, number: int, password: str) -> SeedUser:
    """The `number`-th customer of a seed, from 1."""
    chance = random.Random(f"user {seed} {number}")
    place = chance.choice(_PLACES)
    first, last = chance.choice(place.first_names.split()), chance.choice(place.last_names.split())
    local = ".".join((_plain(first), _plain(last), f"{tag_of(seed).lower()}-{number}"))
    account = {
        "email": f"{local}@example.com",
        "password": password,
        "name": f"{first} {last}",
        "age": 18 + min(int(chance.gammavariate(3.0, 9.0)), 77),
    }
    addresses = tuple(
        msgspec.convert(_address(chance, place, f"{first} {last}"), AddressInput)
        for _ in range(chance.choice(_ADDRESSES))
    )
    return SeedUser(msgspec.convert(account, Registration), addresses)


def _address(chance: random.Random, place: Place, name: str) -> dict[str, Any]:
    street = chance.choice(place.streets.split("|")).format(chance.randint(1, 180))
    return {
        "name": name,
        "line1": street,
        "line2": f"c/o {chance.choice(place.last_names.split())}" if chance.random() < 0.1 else "",
        "postal_code": _digits(chance, place.postal_code),
        "city": chance.choice(place.cities.split("|")),
        "country": place.country,
        "phone": _digits(chance, place.phone) if chance.random() < 0.7 else "",
    }


def _digits(chance: random.Random, pattern: str) -> str:
    chosen = {"#": "0123456789", "@": "ABCDEFGHJKLMNPRSTUWXY"}
    return "".join(chance.choice(chosen.get(character, character)) for character in pattern)


def _plain(name: str) -> str:
    """For an email: ASCII, as people do it."""
    folded = "".join(words_of(name.replace("ł", "l").replace("Ł", "L")))
    assert folded.isascii(), name
    return folded
