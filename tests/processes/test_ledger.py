"""The accounts of a whole node: they close at any moment, through kills and outages, and without the node."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes.test_node import TOPIC, Site, site_in

pytestmark = [pytest.mark.processes, pytest.mark.mosquitto]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For both tests; the last one ends it."""
    with site_in(tmp_path_factory.mktemp("site")) as site:
        site.start()
        yield site


def ledger(site: Site) -> dict[str, Any]:
    """`edgezmq ledger --json`; its exit status says the same as `balanced`."""
    done = site.edgezmq("ledger", "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == document["balanced"]
    return document


def lane(document: dict[str, Any], sender: str, destination: str) -> dict[str, Any]:
    return next(
        (
            each
            for each in document["lanes"]
            if (each["sender"], each["destination"], each["priority"]) == (sender, destination, 3)
        ),
        {"accepted": 0, "delivered": 0, "held": 0},
    )


def check(site: Site) -> None:
    """Whatever is under way: everything accepted is somewhere."""
    document = ledger(site)
    assert document["balanced"], document
    assert document["dropped_messages"] == 0
    for each in document["lanes"]:
        assert each["accepted"] == each["delivered"] + each["refused"] + each["held"], each
    hub = document["edgehub"]
    if hub is not None:
        assert hub["missing"] == 0


def test_a_node_at_rest_says_what_the_mqtt_broker_dropped_or_that_it_is_unknown(site: Site) -> None:
    document = ledger(site)
    assert document["mqtt_broker_dropped"] in (None, 0)
    text = site.edgezmq("ledger").stdout
    assert "the accounts close" in text
    assert "dropped by the MQTT broker" in text


def test_the_accounts_close_through_kills_and_an_outage_and_are_there_when_the_node_is_down(site: Site) -> None:
    sent: list[str] = []

    def publish(count: int) -> None:
        texts = [f'{{"n": {len(sent) + number}}}' for number in range(count)]
        site.publish(*texts)
        sent.extend(texts)

    publish(200)
    site.until(lambda: lane(ledger(site), "eventbus", "@hub")["delivered"] == 200, "200 in the lane's account")
    check(site)
    for victim in ("edgehub", "eventbus", "broker"):
        publish(100)
        os.kill(site.wait_running(victim), signal.SIGKILL)
        publish(100)
        check(site)
    site.until(lambda: len(set(site.uploads(TOPIC))) == len(sent), "all to arrive")
    site.until(lambda: (ledger(site)["edgehub"] or {}).get("held") == 0, "edgehub to hold nothing")
    check(site)
    # The broker's account begins with the broker: only what came since.
    account = lane(ledger(site), "eventbus", "@hub")
    assert account["held"] == 0
    assert 0 < account["delivered"] <= 200

    site.control("/faults", {"fault": "restart", "seconds": 60.0})
    site.until(lambda: not site.is_served(), "the link to be lost")
    publish(50)
    site.until(lambda: sum(each["messages"] for each in ledger(site)["stored"]) >= 50, "the messages to be on disk")
    check(site)
    assert site.edgezmq("down").returncode == 0
    document = ledger(site)
    assert not document["is_live"]
    assert next(each for each in document["stored"] if each["class"] == "data")["messages"] == 50
    assert document["dropped_messages"] == 0
    text = site.edgezmq("ledger").stdout
    assert "stored, waiting for the cloud: 50 data" in text
