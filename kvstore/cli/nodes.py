"""`serve`, `join` and `dev`: the commands that run nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from kvstore.cli.logs import FORMATS, LEVELS, server_log
from kvstore.cli.options import Connection, Number, Size, connection_options
from kvstore.errors import KvError, Refused, StartupError
from kvstore.limits import check_address
from kvstore.model import Member

F = TypeVar("F", bound=Callable[..., Any])


def parse_peers(text: str) -> tuple[Member, ...]:
    """`name=peer_address[/client_address],…` as initial members. Raises `click.BadParameter`."""
    from kvstore.server.identity import check_name

    members = []
    for part in text.split(","):
        name, equals, addresses = part.strip().partition("=")
        peer, _, client = addresses.partition("/")
        if not equals:
            raise click.BadParameter(f"{part.strip()!r} is not name=host:port or name=host:port/host:port")
        try:
            check_name(name)
            check_address(peer)
            if client:
                check_address(client)
        except KvError as error:
            raise click.BadParameter(f"{part.strip()!r}: {error.message}") from None
        members.append(Member(name, peer, client, "", True))
    if len({member.name for member in members}) != len(members):
        raise click.BadParameter("a name stands there twice")
    taken = [address for member in members for address in (member.peer_address, member.client_address) if address]
    if len(set(taken)) != len(taken):
        raise click.BadParameter("an address stands there twice")
    return tuple(members)


def node_options(command: F) -> F:
    """What every node is told. The command gets the limits among it as `limits`, for `ServerOptions`."""
    options = [
        click.option("--name", required=True, help="This node's name; unique in its cluster, and kept for life."),
        click.option(
            "--data-dir",
            required=True,
            type=click.Path(file_okay=False),
            help="The node's own directory; made where it is missing.",
        ),
        click.option("--listen", metavar="HOST:PORT", help="Where the other nodes reach this one."),
        click.option("--client-listen", metavar="HOST:PORT", help="Where clients reach it."),
        click.option(
            "--http-listen",
            metavar="HOST:PORT",
            default="",
            help="Where health and metrics are served; nowhere if empty.",
        ),
        click.option(
            "--advertise",
            metavar="HOST:PORT",
            default="",
            help="What the other nodes are told to connect to, if not --listen; needed where that is 0.0.0.0 or [::].",
        ),
        click.option(
            "--client-advertise",
            metavar="HOST:PORT",
            default="",
            help="What clients are told to connect to, if not --client-listen; needed where that is 0.0.0.0 or [::].",
        ),
        click.option(
            "--insecure",
            is_flag=True,
            help="Listen on addresses that other machines reach, although there is no TLS and no authentication yet.",
        ),
        click.option(
            "--quota",
            type=Size(),
            default="16GiB",
            show_default=True,
            metavar="SIZE",
            help="Largest size of the store, records and history together. Above it only deletes, reads and compaction "
            "are taken, and an alarm is shown. 0 is none.",
        ),
        click.option(
            "--history-age",
            type=Number(0, 10 * 365 * 86400),
            default=3600.0,
            show_default=True,
            metavar="SECONDS",
            help="How long the past can be read and watched from, unless --history-size is reached before.",
        ),
        click.option(
            "--history-size",
            type=Size(),
            default="1GiB",
            show_default=True,
            metavar="SIZE",
            help="How much of the past is kept at most.",
        ),
        click.option(
            "--client-rate",
            type=click.IntRange(0, 10_000_000),
            default=0,
            show_default=True,
            metavar="REQUESTS",
            help="Requests a second of one client connection; more of them wait, and those that waited for long are "
            "refused. 0 is no limit.",
        ),
        click.option("--log-format", type=click.Choice(FORMATS), default="auto", show_default=True),
        click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True),
        click.option("--with-parent", is_flag=True, hidden=True, help="Stop when standard input ends."),
    ]

    @functools.wraps(command)
    def with_limits(
        *args: Any, quota: int, history_age: float, history_size: int, client_rate: int, **kwargs: Any
    ) -> Any:
        from kvstore.state.mvcc import Retention

        retention = Retention(age_ms=round(history_age * 1000), size_bytes=history_size)
        limits = {"quota_bytes": quota, "retention": retention, "client_rate": client_rate}
        return command(*args, limits=limits, **kwargs)

    decorated: Any = with_limits
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def check_advertised(listen: str, advertise: str, client_listen: str, client_advertise: str) -> None:
    """What the cluster is to record of a node must lead there from elsewhere. Raises `click.UsageError`."""
    for option, own, told in (("", listen, advertise), ("client-", client_listen, client_advertise)):
        try:
            check_address(told or own)
        except Refused as error:
            what = f"--{option}advertise" if told else f"--{option}listen, and there is no --{option}advertise"
            raise click.UsageError(f"{what}: {error.message}") from None


token_option = click.option(
    "--cluster-token",
    envvar="KVSTORE_CLUSTER_TOKEN",
    show_envvar=True,
    help="Any text, the same on all nodes of one cluster; nodes with another one refuse each other.",
)


def ends_when_removed(command: F) -> F:
    """A node that was taken out of its cluster ends well, and says so."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except StartupError as error:
            if error.code != "removed_from_cluster":
                raise
            click.echo(f"{error.message}; its data directory may be deleted", err=True)
            return 0

    return run  # type: ignore[return-value]


@click.command()
@node_options
@click.option(
    "--peers",
    metavar="NAME=PEER[/CLIENT],…",
    help="The cluster's initial nodes, this one among them: name=host:port, or name=host:port/host:port with the "
    "address for clients. The same on all of them. Not needed once the data directory knows its cluster.",
)
@token_option
@click.option("--heartbeat-ms", type=click.IntRange(10, 10_000), default=100, show_default=True)
@click.option(
    "--election-ms",
    type=click.IntRange(50, 60_000),
    default=500,
    show_default=True,
    help="Shortest time without a leader after which this node stands for election; the longest is twice that.",
)
@ends_when_removed
def serve(
    name: str,
    data_dir: str,
    listen: str | None,
    client_listen: str | None,
    http_listen: str,
    advertise: str,
    client_advertise: str,
    insecure: bool,
    log_format: str,
    log_level: str,
    with_parent: bool,
    limits: dict[str, Any],
    peers: str | None,
    cluster_token: str | None,
    heartbeat_ms: int,
    election_ms: int,
) -> None:
    """Run one node of a cluster, in the foreground, until SIGTERM or Ctrl-C (a second one ends it at once).

    \b
    A cluster of three, one line on each machine (or terminal):
      kvstore serve --name n1 --data-dir d1 --cluster-token t \\
        --peers n1=127.0.0.1:7411/127.0.0.1:7421,n2=127.0.0.1:7412/127.0.0.1:7422,n3=127.0.0.1:7413/127.0.0.1:7423

    Where --listen and --client-listen are not given they are what --peers says of this node.
    """
    from kvstore.cli import serve as serving
    from kvstore.server.identity import cluster_id
    from kvstore.server.node import ServerOptions

    members = parse_peers(peers) if peers is not None else ()
    own = next((member for member in members if member.name == name), None)
    if members and own is None:
        raise click.UsageError(f"--peers does not have {name} in it; to add a node to a cluster use `kvstore join`")
    if members and cluster_token is None:
        raise click.UsageError("--peers needs --cluster-token (or KVSTORE_CLUSTER_TOKEN), the same on all nodes")
    listen = listen or (own.peer_address if own else None)
    client_listen = client_listen or (own.client_address if own else None)
    if not listen or not client_listen:
        raise click.UsageError("give --listen and --client-listen, or both addresses of this node in --peers")
    check_advertised(listen, advertise, client_listen, client_advertise)
    if heartbeat_ms * 3 > election_ms:
        raise click.UsageError("--election-ms must be at least three times --heartbeat-ms")
    options = ServerOptions(
        name=name,
        data_dir=data_dir,
        cluster_id=cluster_id([member.name for member in members], cluster_token or "") if members else "",
        members=members,
        peer_listen=listen,
        client_listen=client_listen,
        http_listen=http_listen,
        peer_advertise=advertise,
        client_advertise=client_advertise,
        insecure=insecure,
        heartbeat_ms=heartbeat_ms,
        election_min_ms=election_ms,
        election_max_ms=2 * election_ms,
        version=serving.version(),
        **limits,
    )
    serving.serve(options, server_log(name, log_format, log_level), parent_pipe=with_parent)


@click.command()
@node_options
@click.option(
    "--learner",
    is_flag=True,
    help="Stay without a vote: a replica to read from, which no quorum waits for (see `kvstore member promote`).",
)
@connection_options
@ends_when_removed
def join(
    name: str,
    data_dir: str,
    listen: str | None,
    client_listen: str | None,
    http_listen: str,
    advertise: str,
    client_advertise: str,
    insecure: bool,
    log_format: str,
    log_level: str,
    with_parent: bool,
    limits: dict[str, Any],
    learner: bool,
    connection: Connection,
) -> None:
    """Add a new node to a running cluster, and run it.

    The directory must be new, or this node's own: of a join that was interrupted, or of a node that was taken out. The
    node begins as a learner, without a vote, and gets its vote once it has caught up. Run the same command again after
    an interruption; afterwards `kvstore serve` without --peers starts it as well.

    \b
      kvstore join --name n4 --data-dir d4 --listen 127.0.0.1:7414 --client-listen 127.0.0.1:7424 \\
        --endpoints 127.0.0.1:7421
    """
    from kvstore.cli import join as joining
    from kvstore.cli import serve as serving
    from kvstore.server.node import ServerOptions

    if not listen or not client_listen:
        raise click.UsageError("give --listen and --client-listen")
    check_advertised(listen, advertise, client_listen, client_advertise)
    options = ServerOptions(
        name=name,
        data_dir=data_dir,
        peer_listen=listen,
        client_listen=client_listen,
        http_listen=http_listen,
        peer_advertise=advertise,
        client_advertise=client_advertise,
        insecure=insecure,
        version=serving.version(),
        **limits,
    )
    log = server_log(name, log_format, log_level)
    joining.join(
        options, connection.endpoints, connection.timeout_s, log, stay_learner=learner, parent_pipe=with_parent
    )


@click.command()
@click.option(
    "--nodes", type=click.IntRange(1, 9), default=3, show_default=True, help="How many; 1, 3 or 5 make sense."
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False),
    required=True,
    help="One directory for all of them; kept, so that the same command finds its data again.",
)
@click.option(
    "--base-port",
    type=click.IntRange(1024, 65000),
    default=7411,
    show_default=True,
    help="Node i listens for the others on this + i - 1, and for clients ten above that.",
)
@click.option(
    "--restart-after",
    type=Number(0, 3600),
    default=None,
    metavar="SECONDS",
    help="Start a node that died again after this long. Without it, a dead node stays dead.",
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
def dev(nodes: int, data_dir: str, base_port: int, restart_after: float | None, log_level: str) -> int:
    """Run a whole local cluster, each node a process of its own, until Ctrl-C or SIGTERM.

    DATA-DIR/cluster.json always holds the nodes' process ids and addresses: kill one and watch.
    """
    from kvstore.cli.dev import DevOptions, run_dev

    return run_dev(
        DevOptions(
            nodes=nodes, data_dir=data_dir, base_port=base_port, restart_after_s=restart_after, log_level=log_level
        )
    )


COMMANDS: tuple[click.Command, ...] = (serve, join, dev)
