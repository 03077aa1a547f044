"""`kvstore`: the command. This module has the group, the exit codes and how errors are shown; each command's own
module says what it does.

Exit codes, stable and meant for scripts:

    0    done
    1    refused: the request cannot be done as it is; nothing changed
    2    wrong usage of this command
    3    unavailable: nothing changed, and the same command may succeed later
    4    outcome unknown: it may have taken effect; look before you repeat it
    5    a node refused to start
    6    not there: `get` found no such key
    70   a bug in kvstore
    130  interrupted
"""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import click

from kvstore.cli import backup, cluster, data, history, leases, locks, nodes
from kvstore.errors import InternalError, KvError, OutcomeUnknown, Refused, StartupError, Unavailable

REFUSED, UNAVAILABLE, OUTCOME_UNKNOWN, STARTUP, INTERNAL, INTERRUPTED = 1, 3, 4, 5, 70, 130

EPILOG = """\b
Exit codes: 0 done, 1 refused, 2 wrong usage, 3 unavailable (try again), 4 outcome unknown (look before you repeat),
5 a node refused to start, 6 no such key, 70 a bug, 130 interrupted."""

_ADVICE = {
    Unavailable: "Nothing changed. See `kvstore status`; try again, or raise --timeout.",
    OutcomeUnknown: "It may have taken effect. Read back before you repeat it.",
    InternalError: "This is a bug in kvstore; please report it with the servers' logs.",
}


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from kvstore.cli.serve import version

        click.echo(f"kvstore {version() or '(run from its source, not installed)'}")
        context.exit()


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Which this is."
)
def cli() -> None:
    """A replicated, transactional key-value store.

    \b
    Run a cluster on this machine:  kvstore dev --nodes 3 --data-dir data
    Use it:                         export KVSTORE_ENDPOINTS=127.0.0.1:7421,127.0.0.1:7422,127.0.0.1:7423
                                    kvstore put greeting hello && kvstore get greeting
    """


for command in (
    *nodes.COMMANDS,
    *cluster.COMMANDS,
    *data.COMMANDS,
    *history.COMMANDS,
    *leases.COMMANDS,
    *locks.COMMANDS,
    *backup.COMMANDS,
):
    cli.add_command(command)


def exit_code(error: KvError) -> int:
    """The exit code of an error's family."""
    if isinstance(error, Refused):
        return REFUSED
    if isinstance(error, Unavailable):
        return UNAVAILABLE
    if isinstance(error, OutcomeUnknown):
        return OUTCOME_UNKNOWN
    return STARTUP if isinstance(error, StartupError) else INTERNAL


def show_error(error: KvError) -> None:
    """On stderr: what happened, its code, what to do next."""
    where = f" (operation {'.'.join(map(str, error.operation))})" if error.operation else ""
    click.echo(f"{click.style('error', fg='red', bold=True)} [{error.code}]{where}: {error.message}", err=True)
    advice = _ADVICE.get(type(error)) if error.code != "storage_failed" else None  # its message says what to do
    if advice:
        click.echo(advice, err=True)


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        result = cli.main(args=arguments, prog_name="kvstore", standalone_mode=False)
    except KvError as error:
        show_error(error)
        return exit_code(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # `kvstore range | head`
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        show_error(InternalError("the command met a bug; what it was doing stands above"))
        return INTERNAL
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    sys.exit(run())


if __name__ == "__main__":
    main()
