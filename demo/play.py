"""`--keep`: a node to play with, and how."""

from __future__ import annotations

import time

from demo.around import QUIC
from demo.cloud import CloudApplication
from demo.device import COMMANDS, MEASUREMENTS
from demo.show import READY_SECONDS
from demo.stage import NODE, Stage, wait
from demo.telling import Teller


def play(stage: Stage, teller: Teller, mqtt: str) -> int:
    """Start everything, say what can be done with it, and stay until `edgezmq down` or KeyboardInterrupt."""
    stage.start_cloud()
    teller.step("cloudsim is up: it stands for the cloud.")
    stage.start_mqtt(mqtt)
    teller.step(f"MQTT: {stage.mqtt_name}, port {stage.mqtt_port}.")
    stage.start_node()
    cloud = CloudApplication(stage.control_port, NODE, is_content_bytes=stage.link == QUIC)
    wait(cloud.is_served, "the cloud link", READY_SECONDS, log=stage.home.log / "edgehub.log")
    teller.step(f"The node {NODE} is up and the cloud serves it. Its files are in {stage.home.path}.")
    for line in HOW_TO.format(
        home=stage.home.path,
        mqtt_port=stage.mqtt_port,
        control=f"http://127.0.0.1:{stage.control_port}",
        node=NODE,
        measurements=MEASUREMENTS,
        commands=COMMANDS,
    ).splitlines():
        teller.line(line)
    while not stage.node_was_stopped():
        stage.check()
        time.sleep(0.1)  # between two looks
    teller.say("The node was stopped (`edgezmq down`): ending what is around it, too.")
    return 0


HOW_TO = """
In another terminal, in this directory:

  . .venv/bin/activate; export EDGEZMQ_HOME={home}

  edgezmq status                  what runs, what waits, how the cloud link is (--watch 1: again and again)
  edgezmq tap                     every message as it passes the broker
  edgezmq logs edgehub -f         one process's log
  edgezmq restart eventbus        others do not notice; `kill -9` any process, it comes back

  a device publishes, the cloud gets it (under +/user/#):
    mosquitto_pub -p {mqtt_port} -q 1 -t {measurements} -m '{{"celsius": 21.5}}'
  what has come up to the cloud, and what still comes:
    curl -sN {control}/events
  a device waits for commands, the cloud sends one:
    mosquitto_sub -p {mqtt_port} -t {commands}
    curl -s {control}/nodes/{node}/messages -d '{{"route": {{"source": "router_eventbus",
      "group": "user", "operation": "publish", "resource": "{commands}"}}, "content": {{"light": true}}}}'
  break the link for five seconds:
    curl -s {control}/faults -d '{{"fault": "restart", "seconds": 5}}'

Without mosquitto's clients, `edgezmq send cloud -r hello --content '{{"n": 1}}'` sends something up, too.
Ctrl-C here ends everything.
"""
