"""All that docs/emp.md demands of a module, and the survey that tells which of it applies. Each begins anew."""

from __future__ import annotations

from typing import Final

from runtime import emp
from runtime.conform import module_attaching, module_receiving, module_sending, referee, wire
from runtime.conform.module_stage import ASKER, ModuleStage, Traits, is_same, message
from runtime.conform.play import Check, Script


def survey(stage: ModuleStage) -> Script:
    """See what it does: answers, sends, asks, retains. What it shows is in `stage.traits`."""
    hello = yield from stage.attached()
    delivery = stage.deliver(message("q-1", {"survey": 1}))

    def look() -> Traits:
        own = [seen.header for seen in stage.own()]
        replies = [
            reply
            for seen in stage.since(delivery.mark, "SEND/1")
            if seen.header.destination == ASKER.name
            for reply in wire.messages_of(seen.frames[2])
        ]
        return Traits(
            name=hello.name,
            groups=tuple(hello.groups),
            liveness=hello.liveness_ms / 1000,
            answers=bool(replies),
            echoes=any(is_same(message("q-1", {"survey": 1}), reply) for reply in replies),
            sends=any(header.destination != ASKER.name for header in own),
            asks=any(header.flags & emp.EXPECTS_REPLY for header in own),
            retains=any(header.flags & emp.RETAIN for header in own),
        )

    yield from stage.whether(lambda: not look().lacking(("answers", "sends", "asks", "retains")), stage.settings.survey)
    stage.traits = look()


SURVEY: Final = Check("survey", "9", "it comes up and says HELLO", survey)
ALL: Final[tuple[Check, ...]] = (
    *referee.RULES,
    *module_attaching.CHECKS,
    *module_receiving.CHECKS,
    *module_sending.CHECKS,
)
