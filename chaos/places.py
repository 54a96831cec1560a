"""Names that several processes of a chaos run must agree on."""

import re
from typing import Final

NODE: Final = "chaos-node"

TOKEN: Final = re.compile(rb"[a-z]\.[0-9a-z]+\.\d+\.\d+\.")
"""In the content of every message that is counted: kind, cell, device or generation or command, number.

Kinds: `u` a device's upload, `a` its answer, `c` an asking of a command, `k` and `m` of maker to keeper and the cloud.
With `go` or `c` as second word of the modules of chaos.mixed: `k` to the other, `m` to the cloud, `q` a question.
"""
