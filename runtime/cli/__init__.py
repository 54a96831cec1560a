"""The command `edgezmq`. Only this package imports typer and rich, and each command its own heavy parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from runtime import __version__
from runtime.errors import EdgezmqError

app = typer.Typer(
    name="edgezmq",
    help="An edge node for KubeEdge clouds: modules as separate processes around a ZeroMQ broker.",
    epilog="Everything a node writes is under EDGEZMQ_HOME (default ~/.local/state/edgezmq). "
    "Start with `edgezmq check`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads the annotation at run time)
    typer.Option(
        "--config",
        "-c",
        help="edgecore.yaml. Default: EDGEZMQ_CONFIG, EDGEZMQ_HOME/edgecore.yaml, /etc/kubeedge/config/edgecore.yaml.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable: JSON instead of a table.")]


@app.command()
def up(
    config: ConfigOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once the node is up; `edgezmq down` ends it.")
    ] = False,
) -> None:
    """Start the node under supervisord; Ctrl-C (or `edgezmq down`) stops all of it."""
    from runtime.cli import node

    node.up(config, detach=detach)


@app.command()
def down(
    timeout: Annotated[float, typer.Option(help="Seconds that modules may take; then they are killed.")] = 30.0,
) -> None:
    """Stop the node: modules drain, then end; nothing is left running."""
    from runtime.cli import node

    node.down(timeout)


@app.command()
def status(
    as_json: JsonOption = False,
    watch: Annotated[
        float, typer.Option("--watch", "-w", help="Show again every so many seconds.", show_default=False)
    ] = 0.0,
) -> None:
    """What runs, what waits, what was refused; the state of the cloud link and why. Exit status 3: no node runs."""
    from runtime.cli import showing as command

    raise typer.Exit(command.show(as_json=as_json, watch_seconds=watch))


@app.command()
def ledger(as_json: JsonOption = False) -> None:
    """What was refused and what was dropped, and whether the accounts close. Exit status 1: messages are missing."""
    from runtime.cli import accounting as command

    raise typer.Exit(command.show(as_json=as_json))


@app.command()
def restart(
    module: Annotated[
        str, typer.Argument(help="Program to restart, as `edgezmq status` names it; `all` for every one.")
    ],
) -> None:
    """Restart one module: it drains, ends, and starts again. The others do not notice."""
    from runtime.cli import node

    node.restart(module)


@app.command()
def logs(
    module: Annotated[str, typer.Argument(help="Program, or `supervisord`.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come; Ctrl-C ends it.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="So many of the last lines.")] = 50,
) -> None:
    """Show the log of a module."""
    from runtime.cli import node

    node.logs(module, follow=follow, lines=lines)


@app.command()
def tap(
    sender: Annotated[str, typer.Option("--from", help="Only what this module sends.", show_default=False)] = "",
    destination: Annotated[str, typer.Option("--to", help="Only to this module, or @group.", show_default=False)] = "",
    resource: Annotated[
        str, typer.Option(help="Only resources that match; * and ? stand for anything.", show_default=False)
    ] = "",
    operation: Annotated[str, typer.Option(help="Only this operation.", show_default=False)] = "",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many messages; 0: go on.")] = 0,
    rate: Annotated[
        int, typer.Option(min=1, help="At most so many batches a second; more are dropped and counted.")
    ] = 200,
    width: Annotated[int, typer.Option(min=0, help="Characters of content to show; 0: all.")] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a message.")] = False,
) -> None:
    """Show messages as they pass the broker. Costs the node little and never holds a message up."""
    from runtime.cli import tapping as command

    command.show(
        sender=sender,
        destination=destination,
        resource=resource,
        operation=operation,
        count=count,
        rate=rate,
        width=width,
        as_json=as_json,
    )


@app.command()
def send(
    to: Annotated[str, typer.Argument(help="A module, @group, or `cloud`.")],
    resource: Annotated[str, typer.Option("--resource", "-r", help="What is operated on.")],
    operation: Annotated[str, typer.Option("--operation", "-o", help="The verb.")] = "upload",
    group: Annotated[str, typer.Option("--group", "-g", help="The message's group (route.group).")] = "user",
    source: Annotated[str, typer.Option(help="The message's source (route.source).")] = "edgezmq",
    content: Annotated[
        str, typer.Option("--content", help="JSON where it is JSON, else text.", show_default=False)
    ] = "",
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--file", help="Content from a file (- for stdin): JSON, UTF-8 text, else bytes.", show_default=False
        ),
    ] = None,
    request: Annotated[bool, typer.Option("--request", help="Wait for the reply and print it.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the receipt or the reply.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply as JSON with all its fields.")] = False,
) -> None:
    """Send one message and wait until it is settled. Exit status 1: refused, or no answer."""
    from runtime.cli import sending as command

    raise typer.Exit(
        command.send(
            to,
            resource=resource,
            operation=operation,
            group=group,
            source=source,
            content=content,
            file=file,
            request=request,
            timeout=timeout,
            as_json=as_json,
        )
    )


@app.command()
def join(
    server: Annotated[
        str,
        typer.Option(
            help="CloudCore's certificate API: HOST[:PORT], port 10002. Default: modules.edgeHub.httpServer.",
            show_default=False,
        ),
    ] = "",
    token: Annotated[
        str, typer.Option(help="What `keadm gettoken` printed. It is hidden from `ps` at once.", show_default=False)
    ] = "",
    token_file: Annotated[
        str, typer.Option(help="Read the token from a file, - for stdin. Also: EDGEZMQ_TOKEN.", show_default=False)
    ] = "",
    node_name: Annotated[
        str,
        typer.Option(help="Default: modules.edged.hostnameOverride, else the host's name.", show_default=False),
    ] = "",
    cloudhub: Annotated[
        str,
        typer.Option(
            help="CloudHub's HOST:PORT, for a new configuration. Default: the server's host, port 10000.",
            show_default=False,
        ),
    ] = "",
    config: ConfigOption = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to go on while the cloud cannot be reached.")] = 300.0,
) -> None:
    """Get this node's certificate with a token; write a configuration where there is none. Exit status 1: refused."""
    from runtime.cli import joining as command

    raise typer.Exit(
        command.join(
            token=token,
            token_file=token_file,
            server=server,
            cloudhub=cloudhub,
            node_name=node_name,
            named=config,
            timeout_seconds=timeout,
        )
    )


@app.command()
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Look for what will not work, before or while the node runs. Exit status 1: something fails."""
    from runtime.cli import checking as command

    raise typer.Exit(command.show(config, as_json=as_json))


@app.command()
def conform(
    command: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="After `--`: the command that starts the module under test.", show_default=False),
    ] = None,
    broker: Annotated[
        str, typer.Option(help="Test the broker at this endpoint instead of a module.", show_default=False)
    ] = "",
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--only", help="Checks by name; * and ? stand for anything. More than once.", show_default=False),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Name the checks, and run none.")] = False,
    tcp: Annotated[bool, typer.Option("--tcp", help="Let the module connect over tcp (loopback), not ipc.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Checks at a time.")] = 6,
    stretch: Annotated[
        float, typer.Option(min=0.1, help="So many times as long for every reaction: for a slow machine.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Test a module in any language (conform -- COMMAND …) or a broker: docs/emp.md. Exit status 1: it fails."""
    from runtime.cli import conforming

    raise typer.Exit(
        conforming.show(
            command or [],
            broker=broker,
            only=only or [],
            list_them=list_them,
            transport="tcp" if tcp else "ipc",
            jobs=jobs,
            stretch=stretch,
            as_json=as_json,
        )
    )


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What it is called on the bus.")],
    lang: Annotated[str, typer.Option(help="c, go, java, javascript, python or rust.")] = "python",
    directory: Annotated[Optional[Path], typer.Option(help="Default: ./NAME.", show_default=False)] = None,  # noqa: UP045
) -> None:
    """Make a module of your own from the example in its language (of a checkout of edgezmq)."""
    from runtime.cli import scaffolding as command

    command.make(name, lang, directory)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Run the demonstration: a node, a simulated cloud, MQTT traffic, and two kills (`edgezmq demo --help`)."""
    os.execv(sys.executable, [sys.executable, "-m", "demo", *context.args])


@app.command(
    "exec", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def exec_(context: typer.Context) -> None:
    """Become a module's command, with a lock, limits, a user of its own: edgezmq exec [--name NAME] … -- COMMAND …"""
    from runtime import exec as command

    command.main(context.args)


config_app = typer.Typer(help="Configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command("import")
def config_import(
    file: Annotated[Path, typer.Argument(help="KubeEdge's edge.yaml of 2019; modules.yaml beside it is read too.")],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Default: EDGEZMQ_HOME/edgecore.yaml; - for stdout.", show_default=False),
    ] = "",
    cloud: Annotated[
        str, typer.Option(help="How old the CloudHub is that this node talks to: 2019, 1.16 (before 1.17) or 1.17.")
    ] = "2019",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Make an edgecore.yaml of an edge.yaml, and name every key that has no place in it."""
    from runtime.cli import importing as command

    command.import_2019(file, output, cloud=cloud, force=force)


@config_app.command("store")
def config_store(config: ConfigOption = None) -> None:
    """Check edgecore.yaml and write run/node.json, as `up` does: for a node that something else than `up` starts."""
    from runtime.cli import node

    node.store_configuration(config)


keys_app = typer.Typer(help="CURVE keys for modules that reach the bus over tcp.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@keys_app.command("make")
def keys_make(
    name: Annotated[str, typer.Argument(help="The module's name, or `broker` for the node's own pair.")],
) -> None:
    """Make a key pair in EDGEZMQ_HOME/pki/curve and say where each half belongs."""
    from runtime.cli import keying as command

    command.make(name)


@keys_app.command("list")
def keys_list(as_json: JsonOption = False) -> None:
    """Public keys, their fingerprints, and which rule of runtime.policy admits each."""
    from runtime.cli import keying as command

    command.show(as_json=as_json)


policy_app = typer.Typer(help="Who may do what on the bus (runtime.policy).", no_args_is_help=True)
app.add_typer(policy_app, name="policy")


@policy_app.command("check")
def policy_check(
    file: Annotated[Optional[Path], typer.Argument(help="Default: the node's own file.", show_default=False)] = None,  # noqa: UP045
) -> None:
    """Look for faults and oddities in the policy of a configuration file. Exit status 1: the node would refuse it."""
    from runtime.cli import policing as command

    raise typer.Exit(command.check(file))


@policy_app.command("show")
def policy_show(
    name: Annotated[str, typer.Argument(help="The module.")],
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", "-c", help="By this file; default: as the node goes by now.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a module may do: who may be it, where it may send, what of it goes to the cloud, how much."""
    from runtime.cli import policing as command

    command.show(name, file, as_json=as_json)


@app.command("reload")
def reload_(config: ConfigOption = None) -> None:
    """Give the running node the policy of the file (runtime.policy, modules, bus.listen); nothing is restarted."""
    from runtime.cli import policing as command

    command.reload(config)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"edgezmq {__version__}")


def main() -> None:
    """The console script. An operator's mistake is one line on stderr and an exit status, never a traceback."""
    if sys.argv[1:2] == ["exec"]:
        # Its arguments are the other program's; and it should not cost a typer before each start.
        from runtime import exec as command

        command.main(sys.argv[2:])
    if sys.argv[1:2] == ["join"]:
        from runtime.cli import joining

        joining.hide_token()
    try:
        app()
    except EdgezmqError as fault:
        sys.stderr.write(f"edgezmq: {fault}\n")
        sys.exit(1)
    except BrokenPipeError:
        # `edgezmq tap | head`: the reader has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        sys.stderr.write(f"edgezmq: {where}{fault.strerror or fault}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
