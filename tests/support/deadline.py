"""How long a test waits for a condition before it fails; a slow machine may stretch it."""

import os

DEADLINE = 20.0 * float(os.environ.get("EDGEZMQ_TEST_STRETCH", "1"))
"Seconds."
