"""edgezmq's runtime: the bus, the SDK that modules use, and what supervises them."""

__version__ = "0.1.0"
