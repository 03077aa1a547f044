"""`python -m services`: run a service, audit the store, create staff, fill a shop, or walk through the whole.

Exit codes: 0 done; 1 it could not be done, and standard error says why; 2 wrong usage. (`audit` has its own.)
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import uvloop

import kvstore
from services.web.problems import Problem
from services.web.serve import WORKERS_MAX, BuildApp, CannotServe, Serving, check_host, run_service

# The three nodes of `kvstore dev`.
DEV_ENDPOINTS: Final = "127.0.0.1:7421,127.0.0.1:7422,127.0.0.1:7423"
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

endpoints_option = click.option(
    "--endpoints",
    envvar="KVSTORE_ENDPOINTS",
    default=DEV_ENDPOINTS,
    show_default=True,
    help="Store nodes, host:port with commas in between.",
)


def serving_options(default_port: int) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        command = click.option("--shared-port", is_flag=True, hidden=True)(command)
        command = click.option(
            "--requests-per-minute",
            type=click.IntRange(0, 1_000_000_000),
            default=0,
            show_default="no limit",
            help="Of one signed-in user, or of one address; in each worker.",
        )(command)
        command = click.option(
            "--workers",
            type=click.IntRange(1, WORKERS_MAX),
            default=1,
            show_default=True,
            help="Processes on this port; one for each core that the service may use.",
        )(command)
        command = click.option(
            "--trusted-proxy",
            multiple=True,
            help="A network, as 10.0.0.0/8, whose X-Forwarded-For is believed; this machine's always is.",
        )(command)
        command = click.option("--insecure", is_flag=True, help="Listen on a public address without TLS.")(command)
        command = click.option("--access-log/--no-access-log", default=True, help="One line for each request.")(command)
        command = click.option("--port", type=click.IntRange(0, 65535), default=default_port, show_default=True)(
            command
        )
        command = click.option("--host", default="127.0.0.1", show_default=True)(command)
        return endpoints_option(command)

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The user service and the order service. They keep everything in kvstore; run any number of each.

    Beside them: a payment provider to test against.
    """


@main.command()
@serving_options(8001)
@click.option("--mailer", help="Who sends mail: module:function, which makes it. Without: files, for development.")
@click.option("--mail-directory", default="data/mail", show_default=True, help="Where the files go.")
@click.option(
    "--history-hours", type=click.IntRange(0, 100_000), default=1, show_default=True,
    help="As the nodes' --history-age: for the date by which an erased account is gone.",
)  # fmt: skip
@click.option(
    "--log-hours", type=click.IntRange(0, 100_000), default=24, show_default=True,
    help="How old the oldest entry in a node's log may be.",
)  # fmt: skip
@click.option(
    "--backup-days", type=click.IntRange(0, 10_000), default=30, show_default=True,
    help="When the last of today's backups is deleted.",
)  # fmt: skip
@click.option(
    "--order-days", type=click.IntRange(0, 10_000), default=90, show_default=True,
    help="How long after an erasure an order under way may keep where it goes to.",
)  # fmt: skip
def users(
    mailer: str | None,
    mail_directory: str,
    history_hours: int,
    log_hours: int,
    backup_days: int,
    order_days: int,
    **options: Any,
) -> None:
    """Serve accounts: register, sign in, change, erase; for admins: find, block, audit."""
    from functools import partial

    from services.users.app import create_app
    from services.users.erasure import Retention
    from services.users.mail import CannotMail, FileMailer, load_mailer
    from services.users.parts import Settings

    retention = Retention(
        history_s=history_hours * 3600,
        log_s=log_hours * 3600,
        backups_s=backup_days * 24 * 3600,
        orders_s=order_days * 24 * 3600,
    )
    try:
        sender = load_mailer(mailer) if mailer else FileMailer(mail_directory)
    except CannotMail as error:
        raise click.ClickException(str(error)) from None
    more = [f"--mail-directory={mail_directory}", *([f"--mailer={mailer}"] if mailer else [])]
    more += [f"--history-hours={history_hours}", f"--log-hours={log_hours}", f"--backup-days={backup_days}"]
    more.append(f"--order-days={order_days}")
    settings = Settings(mailer=sender, retention=retention)
    _serve("users", partial(create_app, settings=settings), more, **options)


def provider_options(command: F) -> F:
    command = click.option(
        "--psp-url", envvar="SANDBOX_PSP_URL", default="http://127.0.0.1:8003", show_default=True,
        help="Where the sandbox provider is.",
    )(command)  # fmt: skip
    return click.option(
        "--provider", help="Another payment provider: module:function, which makes it. Without: the sandbox."
    )(command)


@main.command()
@serving_options(8002)
@provider_options
@click.option(
    "--pay-within-minutes", type=click.FloatRange(0.01, 7 * 24 * 60), default=30.0, show_default=True,
    help="An order that is not paid by then expires, and its goods are sold to others.",
)  # fmt: skip
def orders(provider: str | None, psp_url: str, pay_within_minutes: float, **options: Any) -> None:
    """Serve products, stock, carts, orders, payments, shipments and returns."""
    from functools import partial

    from services.orders.app import Settings, create_app

    settings = Settings(provider=_provider(provider, psp_url), pay_within_s=pay_within_minutes * 60)
    more = [f"--psp-url={psp_url}", f"--pay-within-minutes={pay_within_minutes}"]
    more += [f"--provider={provider}"] if provider else []
    _serve("orders", partial(create_app, settings=settings), more, **options)


@main.command()
@endpoints_option
@provider_options
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), show_default="none",
    help="Answer /metrics, /livez and /readyz there.",
)  # fmt: skip
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Of --metrics-port.")
@click.option("--insecure", is_flag=True, help="Listen on a public address without TLS.")
def worker(
    endpoints: str, provider: str | None, psp_url: str, metrics_port: int | None, metrics_host: str, insecure: bool
) -> None:
    """Do the orders' background work: payments, refunds, expiry. Run any number."""
    from services.orders.worker import Listener, run_worker
    from services.web.logs import configure_logs

    configure_logs("worker")
    listener = Listener(metrics_host, metrics_port, insecure) if metrics_port is not None else None
    try:
        run_worker(endpoints, _provider(provider, psp_url), listener)
    except (CannotServe, ValueError) as error:
        raise click.ClickException(str(error)) from None


@main.command()
@endpoints_option
@click.option("--psp-url", envvar="SANDBOX_PSP_URL", help="Compare with the books of the sandbox provider there.")
@click.option("--provider", help="Compare with those of another provider: module:function, which makes it.")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as one JSON object.")
@click.option("--list-checks", is_flag=True, help="Say what is checked, and check nothing.")
def audit(endpoints: str, psp_url: str | None, provider: str | None, as_json: bool, list_checks: bool) -> None:
    """Prove that the whole store keeps the rules of commerce, as of one revision; it may be in use.

    Exit codes: 0 no violation; 1 violations, which are printed; 2 it could not be done.
    """
    from services.audit.command import COULD_NOT, print_checks, run_audit

    if list_checks:
        print_checks()
        return
    try:
        opened = _provider(provider, psp_url or "") if provider or psp_url else None
    except click.ClickException as error:
        error.show()
        sys.exit(COULD_NOT)
    sys.exit(uvloop.run(run_audit(endpoints, opened, as_json=as_json)))


@main.command("sandbox-psp")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8003, show_default=True)
@click.option("--insecure", is_flag=True, help="Listen on a public address without TLS.")
@click.option("--data-dir", type=click.Path(path_type=Path), default="data/sandbox-psp", show_default=True)
@click.option("--api-key", envvar="SANDBOX_PSP_API_KEY", help="For requests. Default: sk_sandbox.")
@click.option("--webhook-url", envvar="SANDBOX_PSP_WEBHOOK_URL", default="", help="Default: no webhooks.")
@click.option(
    "--webhook-secret",
    "webhook_secrets",
    envvar="SANDBOX_PSP_WEBHOOK_SECRETS",
    multiple=True,
    help="Twice while one is replaced. Default: whsec_sandbox.",
)
@click.option("--public-url", default="", help="Where customers reach it, if not where requests come to.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the failures that chance chooses.")
@click.option("--failure", "rates", multiple=True, metavar="KIND=RATE", help="As timeout_after=0.05; several.")
def sandbox_psp(**options: Any) -> None:
    """Serve a payment provider to test against, another company's as it were: it fails on demand."""
    from services.sandbox_psp.process import run_command

    try:
        run_command(**options)
    except (CannotServe, ValueError) as error:
        raise click.ClickException(str(error)) from None


@main.command("create-staff")
@endpoints_option
@click.option("--email", required=True)
@click.option(
    "--role", type=click.Choice(["staff", "admin"]), default="staff", show_default=True,
    help="Staff put products and stock, and read accounts; admins change accounts as well.",
)  # fmt: skip
@click.option("--name", default="Staff", show_default=True)
@click.option("--age", type=click.IntRange(0, 150), default=0, help="Only because every account has one.")
@click.option("--password-stdin", is_flag=True, help="Read the password from the first line of standard input.")
@click.option("--replace", is_flag=True, help="If the account is there, give it this password and the role.")
def create_staff(
    endpoints: str, email: str, role: str, name: str, age: int, password_stdin: bool, replace: bool
) -> None:
    """Create an account of staff or an admin, straight in the store.

    The password comes from standard input with --password-stdin, else from STAFF_PASSWORD, else from a prompt.
    """
    if password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = os.environ.get("STAFF_PASSWORD") or click.prompt(
            "Password", hide_input=True, confirmation_prompt=True
        )

    async def create() -> int:
        from services.users.parts import create_staff as create_account
        from services.users.passwords import check_length
        from services.web.tokens import Role

        check_length(password)
        async with kvstore.connect(endpoints) as store:
            return (await create_account(store, email, password, name, age, Role(role), replace=replace)).id

    click.echo(f"{role} account {_run(create())} for {email}")


@main.command("rotate-keys")
@endpoints_option
@click.option("--drop-old", is_flag=True, help="Somebody else may have the old key: refuse what it signed.")
def rotate_keys(endpoints: str, drop_old: bool) -> None:
    """Sign access tokens with a new key.

    Older keys are kept until what they signed has expired (ten minutes or so), then go by themselves.
    """

    async def turn() -> str:
        from services.users.parts import rotate_keys as rotate

        async with kvstore.connect(endpoints) as store:
            return await rotate(store, drop_old=drop_old)

    click.echo(f"tokens are signed with key {_run(turn())} within a minute")


@main.command()
@endpoints_option
@click.option("--products", type=click.IntRange(0, 99_999), default=5000, show_default=True)
@click.option("--users", type=click.IntRange(0, 1_000_000), default=2000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed makes the same shop.")
@click.option(
    "--password", envvar="SEED_PASSWORD", default="walk-the-shop-42", show_default=True,
    help="Of all these users: one hash serves them all, since hashing takes its time on purpose.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a summary as one JSON object, nothing else.")
def seed(endpoints: str, products: int, users: int, seed: int, password: str, as_json: bool) -> None:
    """Fill the store with a catalogue and customers, to try things with.

    What is there already stays as it is, so it may be run again, also to complete a run that was interrupted.
    """
    from services.seed.command import run_seed

    _run(run_seed(endpoints, products, users, seed, password, as_json))


@main.command()
@endpoints_option
@click.option("--users-url", default="http://127.0.0.1:8001", show_default=True)
@click.option("--orders-url", default="http://127.0.0.1:8002", show_default=True)
@click.option(
    "--psp-url", default="http://127.0.0.1:8003", show_default=True, help="The sandbox provider, for its books."
)
@click.option("--data-dir", default="data", show_default=True, help="Where `kvstore dev` keeps cluster.json.")
@click.option("--stay", is_flag=True, help="Keep running after the walk, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object, nothing else.")
def demo(
    endpoints: str, users_url: str, orders_url: str, psp_url: str, data_dir: str, stay: bool, as_json: bool
) -> None:
    """Walk through the whole against a running set: order, kill the leader, order again; pay, ship, refund, return."""
    from services.demo.walk import run_demo

    sys.exit(asyncio.run(run_demo(endpoints, users_url, orders_url, psp_url, data_dir, stay, as_json)))


@main.command()
@endpoints_option
@click.option("--users-url", "users_urls", multiple=True, default=["http://127.0.0.1:8001"], show_default=True)
@click.option(
    "--orders-url", "orders_urls", multiple=True, default=["http://127.0.0.1:8002"], show_default=True,
    help="Several, if there are several processes: each request goes to any of them.",
)  # fmt: skip
@click.option("--shoppers", type=click.IntRange(1, 2000), default=50, show_default=True, help="At once.")
@click.option("--minutes", type=click.FloatRange(0.01, 24 * 60), default=1.0, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0, 10_000), default=0.0, show_default="as fast as they can",
    help="Visits that begin in a second.",
)  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="Decides who does what.")
@click.option("--accounts", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Shared by all.")
@click.option("--hot-products", type=click.IntRange(1, 99), default=20, show_default=True, help="What they want.")
@click.option("--stock", type=click.IntRange(0, 1_000_000), default=30, show_default=True, help="Of each, at first.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object, nothing else.")
def shoppers(endpoints: str, as_json: bool, **options: Any) -> None:
    """Simulate customers and staff against running services, and report what happened.

    It makes accounts, products and orders: point it at nothing that is in earnest. Every answer is judged, and
    everything that was acknowledged is read back at the end.
    """
    from services.shoppers.command import run_shoppers
    from services.shoppers.simulation import Options

    sys.exit(_run(run_shoppers(endpoints, Options(**options), as_json)))


def _provider(name: str | None, sandbox_url: str) -> Any:
    from services.payments.loading import CannotLoadProvider, load_provider

    try:
        return load_provider(name, sandbox_url)
    except CannotLoadProvider as error:
        raise click.ClickException(str(error)) from None


def _run(work: Coroutine[Any, Any, T]) -> T:
    """What a command does in the store; why it cannot, as a command says it."""
    try:
        return uvloop.run(work)
    except Problem as problem:
        raise click.ClickException(f"{problem.kind.title}: {problem.detail} [{problem.code}]") from None
    except (kvstore.KvError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _serve(
    service: str,
    build: BuildApp,
    more: list[str],
    *,
    endpoints: str,
    host: str,
    port: int,
    access_log: bool,
    insecure: bool,
    workers: int,
    requests_per_minute: int,
    shared_port: bool,
    trusted_proxy: tuple[str, ...],
) -> None:
    """`more` are the service's own options, for the workers that share its port."""
    from services.web.limits import Limit
    from services.web.logs import AccessLog, configure_logs
    from services.web.workers import command_of, run_workers

    configure_logs(service)
    try:
        if workers > 1:
            check_host(host, insecure)
            options = [f"--endpoints={endpoints}", f"--host={host}", f"--port={port}"]
            options += ["--access-log" if access_log else "--no-access-log", *(["--insecure"] if insecure else [])]
            options += [f"--requests-per-minute={requests_per_minute}", *more]
            options += [f"--trusted-proxy={network}" for network in trusted_proxy]
            sys.exit(run_workers(command_of(service, options), workers, host, port))
        run_service(
            build,
            Serving(
                endpoints=endpoints,
                host=host,
                port=port,
                insecure=insecure,
                shared_port=shared_port,
                access_log=AccessLog(service) if access_log else None,
                limit=Limit(service, requests_per_minute) if requests_per_minute else None,
                trusted_proxies=trusted_proxy,
            ),
        )
    except (CannotServe, ValueError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="python -m services")
