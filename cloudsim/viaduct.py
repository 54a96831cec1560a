"""The hub's messages as viaduct packs them for QUIC. No I/O.

The fields resourceversion, destination and type do not exist in this form, and content is bytes
whatever it was (docs/cloudlink.md, QUIC).
"""

from __future__ import annotations

from typing import Final

from cloudsim.wire import CloudMessage, Codec, Header, Route, Undecodable, content_data
from runtime import viaduct
from runtime.errors import InvalidMessage, MalformedMessage
from runtime.message import BYTES, JSON, Message


class CrashingPayload(Undecodable):
    """A payload without its header or router part: a real CloudCore ends on it as a whole."""


def encode(message: CloudMessage) -> bytes:
    """The protobuf payload of a package. Raises TypeError or ValueError for what has no form or is too long."""
    header, route = message.header, message.route
    try:
        payload = viaduct.encode_message(
            Message(
                id=header.msg_id,
                parent_id=header.parent_msg_id,
                timestamp=header.timestamp,
                sync=header.sync,
                source=route.source,
                group=route.group,
                resource=route.resource,
                operation=route.operation,
                kind=BYTES,
                content=content_data(message.content),
            )
        )
    except InvalidMessage as fault:
        raise ValueError(str(fault)) from fault
    if len(payload) > viaduct.MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload length {len(payload)} exceeds maximum {viaduct.MAX_PAYLOAD_BYTES}")
    return payload


def decode(payload: bytes) -> CloudMessage:
    """The message in a package. Raises Undecodable, CrashingPayload."""
    try:
        message = viaduct.decode_message(payload)
    except viaduct.MissingPart as fault:
        raise CrashingPayload(str(fault)) from fault
    except MalformedMessage as fault:
        raise Undecodable(str(fault)) from fault
    return CloudMessage(
        Header(message.id, message.parent_id, message.timestamp, sync=message.sync, type=message.type),
        Route(source=message.source, group=message.group, operation=message.operation, resource=message.resource),
        None if message.kind == JSON else message.content,
    )


VIADUCT_CODEC: Final = Codec("quic", encode, decode, has_control=False)
