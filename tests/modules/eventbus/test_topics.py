"""The topic tables of both KubeEdge versions, row by row, and filter matching."""

from __future__ import annotations

import base64

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modules.eventbus.topics import (
    FIXED_FILTERS,
    HUB,
    TWIN,
    Route,
    Semantics,
    auth_info_topic,
    connected_topic,
    decode_topic,
    disconnected_topic,
    encode_topic,
    is_filter,
    is_topic,
    matches,
    membership_topic,
    route,
)

HEAD, Y2019 = Semantics.HEAD, Semantics.Y2019
TOPICS = st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


def b64(topic: str) -> str:
    return base64.urlsafe_b64encode(topic.encode()).decode()


def test_the_fixed_filters_of_head_are_exactly_these_six() -> None:
    assert set(FIXED_FILTERS[HEAD]) == {
        "$hw/events/upload/#",
        "$hw/events/device/+/+/state/update",
        "$hw/events/device/+/+/twin/+",
        "$hw/events/node/+/membership/get",
        "SYS/dis/upload_records",
        "+/user/#",
    }
    assert len(FIXED_FILTERS[HEAD]) == 6


def test_the_fixed_filters_of_2019_are_exactly_these_five() -> None:
    assert set(FIXED_FILTERS[Y2019]) == {
        "$hw/events/upload/#",
        "$hw/events/device/+/state/update",
        "$hw/events/device/+/twin/+",
        "$hw/events/node/+/membership/get",
        "SYS/dis/upload_records",
    }
    assert len(FIXED_FILTERS[Y2019]) == 5


@pytest.mark.parametrize("table", FIXED_FILTERS.values(), ids=lambda table: str(len(table)))
def test_every_fixed_filter_can_be_subscribed(table: tuple[str, ...]) -> None:
    assert all(map(is_filter, table))


@pytest.mark.parametrize(
    "topic",
    [
        "$hw/events/device/test-device/twin/update",
        "$hw/events/device/default/pump/twin/get",
        "$hw/events/device/default/pump/state/update",
        "$hw/events/device/default/pump/something/else/deep",
        "$hw/events/device",
        "$hw/events/node/n1/membership/get",
        "$hw/events/node/n1",
    ],
)
def test_head_device_and_node_topics_go_to_twin_with_the_topic_in_base64(topic: str) -> None:
    assert route(topic, HEAD) == Route(TWIN, b64(topic), "response")


@pytest.mark.parametrize(
    "topic",
    [
        "SYS/dis/upload_records",
        "$hw/events/upload/a/b",
        "default/user/rule",
        "plain",
        "ünï/cødé",
        "$hw/events/devices/x",  # another level, not below the device tree
        "$hw/events/nodepool",
    ],
)
def test_head_everything_else_goes_to_the_hub_in_clear_as_upload(topic: str) -> None:
    assert route(topic, HEAD) == Route(HUB, topic, "upload")


@pytest.mark.parametrize(
    "topic",
    ["$hw/events/device/d/twin/update", "$hw/events/devicexyz", "$hw/events/node/n/membership/get", "$hw/events/nodes"],
)
def test_2019_device_and_node_prefixes_go_to_twin(topic: str) -> None:
    assert route(topic, Y2019) == Route(TWIN, b64(topic), "response")


def test_2019_upload_records_go_to_the_hub_in_clear() -> None:
    assert route("SYS/dis/upload_records", Y2019) == Route(HUB, "SYS/dis/upload_records", "response")


@pytest.mark.parametrize("topic", ["$hw/events/upload/x", "user/topic", "SYS/dis/upload_records/x"])
def test_2019_other_topics_go_to_the_hub_in_base64_as_response(topic: str) -> None:
    assert route(topic, Y2019) == Route(HUB, b64(topic), "response")


def test_head_is_the_default() -> None:
    assert route("a/user/b") == route("a/user/b", HEAD)


@given(TOPICS)
def test_every_topic_has_a_route_in_both_versions(topic: str) -> None:
    for semantics in Semantics:
        found = route(topic, semantics)
        assert found.destination in (HUB, TWIN)
        assert found.resource in (topic, b64(topic))


@given(TOPICS)
def test_an_encoded_topic_decodes_to_itself(topic: str) -> None:
    assert decode_topic(encode_topic(topic)) == topic


@pytest.mark.parametrize("resource", ["a/b", "ab", "====", "ÿ"])
def test_what_is_no_encoded_topic_is_a_value_error(resource: str) -> None:
    with pytest.raises(ValueError):
        decode_topic(resource)


def test_topic_name_formats() -> None:
    assert connected_topic("n1") == "$hw/events/connected/n1"
    assert disconnected_topic("n1") == "$hw/events/disconnected/n1"
    assert membership_topic("g1") == "$hw/events/edgeGroup/g1/membership/get"
    assert auth_info_topic("n1") == "$hw/events/node/n1/authInfo/get/result"


@pytest.mark.parametrize("topic", ["a", "/", "a//b", "$SYS/x", "x" * 65535, "é" * 32767])
def test_these_are_topics(topic: str) -> None:
    assert is_topic(topic)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "x" * 65536, "é" * 32768, "\ud800"])
def test_these_are_no_topics(topic: str) -> None:
    assert not is_topic(topic)


@pytest.mark.parametrize("topic_filter", ["#", "+", "a/#", "+/+/#", "a/b", "/", "$share/g/a/#"])
def test_these_are_filters(topic_filter: str) -> None:
    assert is_filter(topic_filter)


@pytest.mark.parametrize(
    "topic_filter",
    ["", "a#", "#/a", "a/b+", "a/+b/c", "a\0", "\ud800", "$share", "$share//a", "$share/g", "$share/+/a"],
)
def test_these_are_no_filters(topic_filter: str) -> None:
    assert not is_filter(topic_filter)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("+/user/#", "default/user/x", True),
        ("+/user/#", "a/b/user/x", False),
        ("$share/group/a/+", "a/b", True),
        ("$hw/events/device/+/+/twin/+", "$hw/events/device/ns/d/twin/update", True),
        ("$hw/events/device/+/+/twin/+", "$hw/events/device/ns/d/twin/update/result", False),
    ],
)
def test_matching(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@given(TOPICS)
def test_a_topic_matches_itself_and_the_filter_of_its_first_level(topic: str) -> None:
    assume(not topic.startswith("$share"))  # as a filter that means something else
    assert matches(topic, topic)
    assert matches(topic.split("/")[0] + "/#", topic)
