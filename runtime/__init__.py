"""edgezmq's runtime: the bus, the SDK that modules use, and what supervises them."""

from runtime.lean import TYPING, without

__version__ = "0.1.0"

# Every process of ours has these two; imported here, first of all, they come without what they can do without.
with without(*TYPING):
    import msgspec as _msgspec  # noqa: F401
    import zmq as _zmq  # noqa: F401
