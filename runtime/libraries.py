"""msgspec and pyzmq, imported without what they can do without.

Whoever imports one of them imports this first: what comes first decides how lean the process is.
"""

from runtime.lean import TYPING, without

with without(*TYPING):
    import msgspec
    import zmq

__all__ = ["msgspec", "zmq"]
