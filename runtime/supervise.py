"""`python -m runtime.supervise -c CONF …`: supervisord, without what it does not need. Arguments as of supervisord.

It listens on a unix socket only, so OpenSSL stays out of its memory; what its start leaves behind is given back.
"""

from __future__ import annotations

from runtime import memory
from runtime.lean import TLS, TYPING, without


def main() -> None:
    """Become supervisord."""
    with without(*TLS, *TYPING):
        from supervisor import supervisord
    memory.settle()
    supervisord.main()


if __name__ == "__main__":
    main()
