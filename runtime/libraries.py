"""msgspec and pyzmq, imported without what they can do without.

Whoever imports one of them imports this first: what comes first decides how lean the process is.
"""

from runtime.lean import small_libraries

with small_libraries():
    import msgspec
    import zmq

__all__ = ["msgspec", "zmq"]
