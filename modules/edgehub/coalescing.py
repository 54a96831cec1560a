"""Of which messages only the last one counts while the cloud is away: by configuration, none without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

from runtime.errors import ConfigError
from runtime.message import Message

KEY = "runtime.edgehub.coalesce"
_RULE = "two patterns with a space between, for resource and operation, as in `default/thermostat/* upload`"


class Coalescing:
    """Patterns as in the shell: `*`, `?`, `[...]`; `*` matches slashes too. Raises ConfigError."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns: list[tuple[re.Pattern[str], re.Pattern[str]]] = []
        for pattern in patterns:
            resource, space, operation = pattern.rpartition(" ")  # an MQTT topic may hold spaces
            if not space or not resource or not operation:
                raise ConfigError(KEY, pattern, _RULE)
            self._patterns.append((re.compile(translate(resource)), re.compile(translate(operation))))

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def key(self, message: Message) -> str | None:
        """What later messages have in common with this one and may take its place by; None: it stands for itself."""
        for resource, operation in self._patterns:
            if resource.match(message.resource) and operation.match(message.operation):
                return f"{message.group}\0{message.operation}\0{message.resource}"
        return None
