"""The command's pure parts: addresses, bytes as text, transactions as JSON, errors and exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from importlib import metadata
from pathlib import Path
from typing import cast

import click
import msgspec
import pytest

from kvstore import model
from kvstore.cli import cluster, locks, main, txn_text
from kvstore.cli.data import put
from kvstore.cli.main import exit_code, run
from kvstore.cli.nodes import check_advertised, parse_peers
from kvstore.cli.options import Connection
from kvstore.cli.text import print_json, print_table, record_json, to_bytes, to_text
from kvstore.client.client import Client
from kvstore.errors import CODES, InternalError, KvError, OutcomeUnknown, Refused, StartupError, Unavailable, error_for


def test_peers_are_names_with_one_address_or_two() -> None:
    assert parse_peers("n1=127.0.0.1:1/127.0.0.1:2, n2=[::1]:3") == (
        model.Member("n1", "127.0.0.1:1", "127.0.0.1:2", "", True),
        model.Member("n2", "[::1]:3", "", "", True),
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "n1", "n1=", "n1=host", "n1=h:1/h", "a b=h:1", "n1=h:1,n1=h:2", "n1=h:99999", "=h:1", "n1=h:0",
        "n1=0.0.0.0:1", "n1=h:1/[::]:2", "n1=::1:1", "n1=h:1/h:1", "n1=h:1/h:2,n2=h:2/h:3",
    ],
)  # fmt: skip
def test_peers_that_are_none_are_named(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_peers(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--listen", "0.0.0.0:1", "--client-listen", "127.0.0.1:2"), "--listen, and there is no --advertise"),
        (("--listen", "[::]:1", "--client-listen", "127.0.0.1:2"), "stands for every address"),
        (("--listen", "127.0.0.1:1", "--client-listen", "127.0.0.1:0"), "there is no --client-advertise"),
        (("--listen", "[::1:1", "--client-listen", "127.0.0.1:2"), "'[::1:1' is nothing that others can connect to"),
        (
            ("--listen", "127.0.0.1:1", "--client-listen", "127.0.0.1:2", "--advertise", "nonsense"),
            "--advertise: 'nonsense' is nothing",
        ),
    ],
)
@pytest.mark.parametrize("command", ["serve", "join"])
def test_a_node_that_others_could_not_reach_is_not_begun(
    command: str, options: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--name", "n4", "--data-dir", str(tmp_path / "d"), "--insecure", *options]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d").exists()


def test_an_address_that_is_advertised_may_be_another_than_where_it_listens() -> None:
    check_advertised("0.0.0.0:7411", "10.0.0.4:7411", "[::]:7421", "kv-4.example.org:7421")


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


def test_a_node_that_answers_for_another_is_no_row_of_its() -> None:
    node = model.Member("p4", "h:1", "h:2", "1", True)
    row = cluster._status_row(node, Refused("another node, n1, answers at h:2", code="wrong_node"))
    assert row == ("p4", "h:2", "another node", "", "", "", "", "", "another node, n1, answers at h:2")
    assert cluster._status_row(node, Unavailable("gone", code="timeout"))[2::6] == ("unreachable", "timeout")


class Leading:
    """A client of n1, n2 and n3, led by n1, of which each answer to a removal is as given."""

    def __init__(self, *answers: KvError | None) -> None:
        self.answers = list(answers)
        self.members = tuple(model.Member(name, f"{name}:1", "", "", True) for name in ("n1", "n2", "n3"))
        self.leader = "n1"
        self.asked: list[str] = []

    async def status(self) -> model.NodeStatus:
        return model.NodeStatus("n2", "c", "follower", self.leader, "", 1, 1, 1, 1, 1, 1, self.members, ())

    async def member_remove(self, name: str, *, force: bool) -> tuple[model.Member, ...]:
        self.asked.append(f"remove {name}")
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer
        return tuple(member for member in self.members if member.name != name)

    async def transfer_leader(self) -> None:
        self.asked.append("transfer")
        self.leader = "n2"


async def test_a_leader_hands_over_only_for_a_removal_that_would_be_done() -> None:
    refused = Leading(Refused("two would be left", code="would_lose_quorum"))
    with pytest.raises(Refused):
        await cluster.remove_member(cast(Client, refused), "n1", 5.0)
    assert refused.asked == ["remove n1"]
    leading = Leading(Refused("it leads", code="cannot_remove_leader"), None)
    assert len(await cluster.remove_member(cast(Client, leading), "n1", 5.0)) == 2
    assert leading.asked == ["remove n1", "transfer", "remove n1"]


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


def test_a_status_as_json_has_all_that_a_node_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = tuple(model.Member(name, f"{name}:1", f"{name}:2", name, True) for name in ("n1", "n2"))
    peer = model.PeerStatus("n2", True, 7)
    status = model.NodeStatus(
        "n1", "c", "leader", "n1", "n1:2", 1, 2, 3, 4, 5, 6, nodes, (peer,),
        storage_error="its disk", version="1.0", digest="ab", alarms=("quota", "b"), size_bytes=9, cluster_version=2,
    )  # fmt: skip
    looks = [(nodes[0], status), (nodes[1], Unavailable("no answer", code="timeout"))]
    monkeypatch.setattr(Connection, "call", lambda _self, _use: looks)
    assert run(["status", "-o", "json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["status"] == {
        **{name: getattr(status, name) for name in status.__struct_fields__},
        "members": [msgspec.structs.asdict(node) for node in nodes],
        "peers": [msgspec.structs.asdict(peer)],
        "alarms": ["quota", "b"],
    }
    assert first["member"] == msgspec.structs.asdict(nodes[0])
    assert (second["status"], second["error"]) == (None, {"code": "timeout", "message": "no answer"})
    assert run(["status"]) == 0
    assert "its disk" in capsys.readouterr().out


def test_a_name_of_any_bytes_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("grün", "a\udcff"):
        print_json({"file": name})
        out = capsys.readouterr().out
        assert json.loads(out) == {"file": name}
        assert out.encode()


NOT_UTF_8 = "\udcff"


@pytest.mark.parametrize(
    "arguments",
    [
        ["lock", "", "--", "true"],
        ["lock", "a\0b", "--", "true"],
        ["lock", "a", "--ttl", "nan", "--", "true"],
        ["lock", "a", "--wait", "nan", "--", "true"],
        ["lock", "a"],
        ["lease", "grant", "nan"],
        ["lease", "grant", "5", "--timeout", "nan"],
        ["leave", NOT_UTF_8],
        ["member", "remove", NOT_UTF_8],
        ["member", "promote", NOT_UTF_8],
        ["transfer-leader", NOT_UTF_8],
        ["serve", "--name", "n1", "--data-dir", "d", "--history-age", "nan"],
        ["dev", "--data-dir", "d", "--restart-after", "nan"],
    ],
)
def test_what_cannot_be_asked_for_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Usage:" in capsys.readouterr().err


async def test_a_command_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_END_S", 0.2)
    command = ("sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; exec sleep 30")
    for is_lost in (True, False):
        lost, ending = asyncio.Event(), locks._Ending()
        ending.cancels = None
        running = asyncio.ensure_future(locks._run(command, dict(os.environ), lost, ending))
        async with asyncio.timeout(10.0):
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
                await asyncio.sleep(0.01)
            if is_lost:
                lost.set()
                with pytest.raises(Unavailable, match="the lock was lost"):
                    await running
            else:
                os.kill(os.getpid(), signal.SIGTERM)
                assert await running == 128 + signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        (tmp_path / "pid").unlink()
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


def test_an_unreachable_cluster_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["get", "k", "--endpoints", "127.0.0.1:1", "--timeout", "0.2"]) == 3
    said = capsys.readouterr().err
    assert "[timeout]" in said
    assert "kvstore status" in said


def test_kverror_itself_is_a_bug_s_code() -> None:
    assert exit_code(KvError("x")) == 70
