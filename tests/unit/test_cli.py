"""The command's pure parts: addresses, bytes as text, transactions as JSON, errors and exit codes."""

from __future__ import annotations

from importlib import metadata

import click
import msgspec
import pytest

from kvstore import model
from kvstore.cli import cluster, main, txn_text
from kvstore.cli.data import put
from kvstore.cli.main import exit_code, run
from kvstore.cli.nodes import parse_peers
from kvstore.cli.text import print_table, record_json, to_bytes, to_text
from kvstore.errors import CODES, InternalError, KvError, OutcomeUnknown, Refused, StartupError, Unavailable, error_for


def test_peers_are_names_with_one_address_or_two() -> None:
    assert parse_peers("n1=127.0.0.1:1/127.0.0.1:2, n2=[::1]:3") == (
        model.Member("n1", "127.0.0.1:1", "127.0.0.1:2", "", True),
        model.Member("n2", "[::1]:3", "", "", True),
    )


@pytest.mark.parametrize(
    "text", ["", "n1", "n1=", "n1=host", "n1=h:1/h", "a b=h:1", "n1=h:1,n1=h:2", "n1=h:99999", "=h:1"]
)
def test_peers_that_are_none_are_named(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_peers(text)


def test_bytes_as_text() -> None:
    for encoding in ("utf8", "hex", "base64"):
        for data in (b"", b"plain", "grüße".encode()):
            text, found = to_text(data, encoding)
            assert found == encoding
            assert to_bytes(text, found) == data
    assert to_text(b"\xff\xfe", "utf8") == ("//4=", "base64")
    assert to_bytes("\udcff", "utf8") == b"\xff", "what the shell gives is taken as it is"
    for text, encoding in (("xyz", "hex"), ("?", "base64")):
        with pytest.raises(click.BadParameter):
            to_bytes(text, encoding)


def test_a_record_as_json_says_how_its_bytes_are_written() -> None:
    document = record_json(model.Record(b"k", b"\xff", 1, 2, 3), "utf8")
    assert (document["key"], document["key_encoding"]) == ("k", "utf8")
    assert (document["value"], document["value_encoding"]) == ("/w==", "base64")


def test_a_transaction_as_json() -> None:
    txn = txn_text.parse(
        b"""{
          "compare": [{"key": "a", "target": "version", "relation": "==", "operand": 0},
                      {"key": "b", "target": "value", "relation": "!=", "operand": {"base64": "/w=="}},
                      {"key": "p", "end": "q", "target": "count", "relation": "<", "operand": 10}],
          "success": [{"put": {"key": "a", "value": {"base64": "AAE="}, "prev": true}},
                      {"add": {"key": "n", "delta": -1, "min": 0}},
                      {"delete": {"start": "x", "end": ""}},
                      {"txn": {"success": [{"range": {"start": "a", "limit": 5}}]}}],
          "failure": [{"range": {"start": "a", "end": "b", "reverse": true}}]
        }"""
    )
    assert txn == model.Txn(
        (
            model.Compare(b"a", model.Target.VERSION, model.Relation.EQUAL, 0),
            model.Compare(b"b", model.Target.VALUE, model.Relation.NOT_EQUAL, b"\xff"),
            model.Compare(b"p", model.Target.COUNT, model.Relation.LESS, 10, b"q"),
        ),
        (
            model.Put(b"a", b"\x00\x01", prev=True),
            model.Add(b"n", -1, min=0),
            model.Delete(b"x", b""),
            model.Txn(success=(model.Range(b"a", limit=5),)),
        ),
        (model.Range(b"a", b"b", reverse=True),),
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "not a valid transaction"),
        (b"[]", "object"),
        (b'{"success": [{}]}', "here it is nothing"),
        (b'{"success": [{"put": {"key": "a"}}]}', "$.success[0].put"),
        (b'{"success": [{"put": {"key": "a", "value": 7}}]}', "$.success[0].put.value"),
        (b'{"success": [{"pot": {}}]}', "pot"),
        (b'{"success": [{"add": {"key": "a", "delta": 1}, "range": {"start": "b"}}]}', "range and add"),
        (b'{"compare": [{"key": "a", "target": "size", "relation": "==", "operand": 1}]}', "no target 'size'"),
        (b'{"compare": [{"key": "a", "target": "value", "relation": "=", "operand": "1"}]}', "no relation '='"),
        (b'{"success": [{"put": {"key": {"base64": "?"}, "value": ""}}]}', "no base64"),
        (b'{"success": [' + b'{"txn": {"success": [' * 5000 + b"]}}" * 5000 + b"]}", "not a valid transaction"),
    ],
)
def test_a_transaction_that_is_none_says_where(text: bytes, part: str) -> None:
    with pytest.raises(click.UsageError) as wrong:
        txn_text.parse(text)
    assert part in wrong.value.message


def test_results_of_a_transaction_as_text() -> None:
    record = model.Record(b"k", b"v", 1, 1, 1)
    result = model.TxnResult(
        7,
        True,
        (
            model.PutResult(7, record),
            model.AddResult(7, -3),
            model.DeleteResult(7, 2),
            model.RangeResult(7, (record,), 1),
            model.TxnResult(7, False, ()),
        ),
    )
    assert txn_text.result_lines(result, "utf8") == [
        "  put: done",
        "  add: now -3",
        "  delete: 2",
        "  range: 1",
        "    k = v",
        "  txn: compares failed",
    ]
    document = txn_text.result_json(result, "utf8")["txn"]
    assert [next(iter(part)) for part in document["results"]] == ["put", "add", "delete", "range", "txn"]
    assert document["results"][0]["put"]["prev"]["value"] == "v"


def test_every_code_has_its_family_s_exit_code() -> None:
    families = {Refused: 1, Unavailable: 3, OutcomeUnknown: 4, StartupError: 5, InternalError: 70}
    for code in CODES:
        error = error_for(code, "message")
        assert exit_code(error) == families[type(error)]


def test_an_error_is_shown_with_its_code_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    main.show_error(Refused("stock/1 would be -1", code="out_of_range", operation=(2, 0)))
    main.show_error(OutcomeUnknown("no answer"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error [out_of_range] (operation 2.0): stock/1 would be -1"
    assert said[1:] == [
        "error [outcome_unknown]: no answer",
        "It may have taken effect. Read back before you repeat it.",
    ]


def test_a_bug_is_exit_code_70_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main.cli, "main", broken)
    assert run([]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def interrupted(**_: object) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", interrupted)
    assert run([]) == 130


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def explain(command: click.Command, path: tuple[str, ...]) -> None:
        assert run([*path, "--help"]) == 0
        assert command.help, path
        if isinstance(command, click.Group):
            for name, sub in command.commands.items():
                explain(sub, (*path, name))

    explain(main.cli, ())
    assert "Exit codes" in capsys.readouterr().out


def test_a_negative_number_is_an_argument_and_a_mistyped_option_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    def arguments(*args: str) -> tuple[object, object]:
        context = put.make_context("put", list(args))
        return context.params["key"], context.params["value"]

    assert arguments("k", "-5") == ("k", "-5")
    assert arguments("-.5", "-1e-3", "-o", "json", "--timeout=3") == ("-.5", "-1e-3")
    assert arguments("k", "-") == ("k", "-")
    assert arguments("--", "-hello", "--there") == ("-hello", "--there")
    for wrong in (["k", "-x"], ["k", "--value"], ["--ouput", "-5"], ["-x", "-5"], ["-5", "--encodng=hex"]):
        assert run(["put", *wrong]) == 2, wrong
        assert "No such option" in capsys.readouterr().err
    for command in ("get", "del", "range"):
        assert run([command, "-5", "--endpoints", "127.0.0.1:1", "--timeout", "0.1"]) == 3
    assert "No such option" not in capsys.readouterr().err


def test_the_version_is_told_where_none_is_installed_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda _name: "1.2.3")
    assert run(["--version"]) == 0
    monkeypatch.setattr(metadata, "version", missing)
    assert run(["--version"]) == 0
    assert capsys.readouterr() == ("kvstore 1.2.3\nkvstore (run from its source, not installed)\n", "")


def test_a_long_note_is_wrapped_and_a_digest_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    trouble = "the log's disk failed (" + "no space left on device, " * 12 + "28); free some, then restart this node"
    digest = "0123456789abcdef" * 2
    status = model.NodeStatus("n1", "c", "failed", "", "", 1, 2, 3, 4, 5, 6, (), (), trouble)
    answers = (status, msgspec.structs.replace(status, storage_error="", digest=digest))
    node = model.Member("n1", "127.0.0.1:7411", "127.0.0.1:7421", "a", True)
    rows = [cluster._status_row(node, answer) for answer in answers]
    print_table(cluster.STATUS_COLUMNS, rows, widths=cluster.STATUS_WIDTHS)
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 130
    assert digest in out
    for word in trouble.split():
        assert word in out


def test_an_unreachable_cluster_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["get", "k", "--endpoints", "127.0.0.1:1", "--timeout", "0.2"]) == 3
    said = capsys.readouterr().err
    assert "[timeout]" in said
    assert "kvstore status" in said


def test_kverror_itself_is_a_bug_s_code() -> None:
    assert exit_code(KvError("x")) == 70
