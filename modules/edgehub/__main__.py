"""`python -m modules.edgehub`: the process."""

from __future__ import annotations

from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.hub import EdgeHub
from runtime import config
from runtime.module import run


def main() -> None:
    run(EdgeHub(EdgeHubConfig.from_node(config.load())))


if __name__ == "__main__":
    main()
