"""Names that several processes of a chaos run must agree on."""

from typing import Final

NODE: Final = "chaos-node"
