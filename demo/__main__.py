"""`python -m demo`: see what edgezmq does. `make demo` calls it, `make up` calls it with --keep."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo.around import LINKS, QUIC, WSS
from demo.children import DemoFailed, Interrupts
from demo.play import play
from demo.show import Script, Show
from demo.stage import Stage
from demo.telling import Teller
from runtime.errors import EdgezmqError
from runtime.home import HOME_VARIABLE, IPC_PATH_LIMIT, Home

INTERRUPTED = 130
"As shells do for SIGINT: 128 + 2."

_KILLABLE = ("edgehub", "broker", "eventbus", "watchdog")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    script = Script(
        uploads=options.uploads, commands=options.commands, seconds=options.seconds, kills=tuple(options.kill)
    )
    interrupts = Interrupts()
    interrupts.listen()
    directory, home = _places(options.keep, options.home)
    stage = Stage(directory, home, usual_ports=options.keep, link=options.link, interrupts=interrupts)
    is_kept = options.keep
    try:
        with Teller() as teller:
            try:
                interrupts.begin()
                return play(stage, teller, options.mqtt) if options.keep else _show(stage, script, teller, options.mqtt)
            except (DemoFailed, EdgezmqError, OSError) as fault:
                interrupts.close()
                is_kept = True
                teller.end_progress()
                _explain(fault, stage)
                return 1
            except _NotAllWell:
                is_kept = True
                return 1
            except KeyboardInterrupt:
                teller.end_progress()
                teller.say("Interrupted: ending all processes (Ctrl-C again: at once).")
                if not options.keep:
                    stage.close(seconds=2.0)  # nobody wants what its modules would save by draining
                return INTERRUPTED
            finally:
                interrupts.close()
                stage.close()
    finally:
        if not is_kept:
            shutil.rmtree(directory, ignore_errors=True)


class _NotAllWell(Exception):
    """Something was lost; all that is to be said has been said."""


def _show(stage: Stage, script: Script, teller: Teller, mqtt: str) -> int:
    kills = " and ".join(dict.fromkeys(script.kills))
    teller.say(
        "This is an edge node: programs that run near devices and pass messages between them and a cloud. Each part "
        "is a process of its own, so that one may crash without the others. Let us see whether messages get lost "
        f"when we crash some{f' ({kills})' if kills else ''}."
    )
    teller.line()
    stage.start_cloud()
    over = "over QUIC" if stage.link == QUIC else "over TLS"
    teller.step(f"cloudsim is up. It stands for the cloud: it speaks the protocol of KubeEdge's CloudHub {over}.")
    stage.start_mqtt(mqtt)
    teller.step(f"MQTT, the protocol of the devices: {stage.mqtt_name}, port {stage.mqtt_port}.")
    stage.start_node()
    teller.step(
        "supervisord has started the node: broker (passes messages on), eventbus (MQTT), edgehub (cloud), watchdog."
    )
    show = Show(stage, script, teller)
    try:
        show.wait_ready()
        teller.step("A first message went from the device to the cloud, and one from the cloud to the device.")
        teller.step(
            f"Now a thermometer publishes {script.uploads} measurements, each another one, and an application in the "
            f"cloud sends {script.commands} commands to a lamp. It repeats a command until the lamp's answer has come "
            "up, as an application must: KubeEdge does not acknowledge commands."
        )
        tally = show.run()
        faults = show.verdict()
    finally:
        show.close()
    if tally.uploads.duplicated or tally.at_device.duplicated:
        teller.step(
            f"{tally.uploads.duplicated} uploads came twice: they were on the way when a process died, nobody could "
            f"know whether they had arrived, so they were sent again. {tally.at_device.duplicated} commands came "
            "twice, because the application had to ask again. Nothing is sent twice unless something dies."
        )
    if not faults:
        teller.step(
            f"Every one of {tally.uploads.sent} measurements and {tally.commands.sent} commands has arrived"
            f"{f', although {kills} were killed' if script.kills else ''}.",
            style="bold green",
        )
        stage.interrupts.close()
        stage.close()
        teller.last_line(tally.line())
        return 0
    for fault in faults:
        teller.step(f"NOT as it should be: {fault}.", style="bold red")
    program = stage.failing_program() or (tally.kills[-1].program if tally.kills else "eventbus")
    teller.say(f"Look at {stage.home.log / program}.log first; all logs are in {stage.home.log} and {stage.log}.")
    stage.interrupts.close()
    stage.close()
    teller.last_line(tally.line())
    raise _NotAllWell


def _explain(fault: Exception, stage: Stage) -> None:
    text = f"demo: {fault}\n"
    program = stage.failing_program()
    log = stage.home.log / f"{program}.log" if program else getattr(fault, "log", None)
    if log is not None:
        text += f"demo: look at {log}\n"
    text += f"demo: all logs are in {stage.home.log} and {stage.log}\n"
    sys.stderr.write(text)
    sys.stderr.flush()


# --- places -------------------------------------------------------------------------------


def _places(keep: bool, named: Path | None) -> tuple[Path, Path]:
    """Directory of the helpers, and the node's home in it. Unix sockets must have short paths: /tmp where need be."""
    if keep:
        home = named or Path(os.environ.get(HOME_VARIABLE) or ".state")
        home = home.absolute()
        if _fits(home):
            return home / "around", home
    fits = _fits(Path(tempfile.gettempdir()) / "edgezmq-12345678" / "node")
    directory = Path(tempfile.mkdtemp(prefix="edgezmq-", dir=None if fits else "/tmp"))
    return directory, directory / "node"


def _fits(home: Path) -> bool:
    # supervisord binds the longest name: its socket's, with a pid behind it (runtime.cli.node).
    return len(os.fsencode(f"{Home(home).supervisor_socket}.4194304")) <= IPC_PATH_LIMIT


# --- options -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgezmq demo",
        description="Start a node with a simulated cloud and an MQTT broker, send messages both ways, kill processes "
        "in the middle, and count what arrives. Exit status 0 only if nothing was lost. Needs no root and leaves "
        "nothing behind; ports are free ones, so that it runs beside anything.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--keep", action="store_true", help="no show: keep such a node running to play with, until Ctrl-C")
    add("--uploads", type=_count, default=2000, metavar="N", help="MQTT messages that the device publishes")
    add("--commands", type=_count, default=200, metavar="N", help="commands that the cloud sends")
    add("--seconds", type=_seconds, default=8.0, help="over which the messages are spread")
    add(
        "--kill",
        type=_programs,
        default=["edgehub", "broker"],
        metavar="A,B",
        help="what to kill in turn; none: all live",
    )
    add(
        "--mqtt",
        choices=("auto", "mosquitto", "amqtt"),
        default="auto",
        help="MQTT broker; auto: mosquitto if installed",
    )
    add("--link", choices=LINKS, default=WSS, help="transport to the cloud: websocket, or QUIC version 1")
    add("--home", type=Path, metavar="DIR", help="with --keep: the node's home; default: EDGEZMQ_HOME, else ./.state")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 40_000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 to 40000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0.1 to 3600 seconds")
    return value


def _programs(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in _KILLABLE:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_KILLABLE)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
