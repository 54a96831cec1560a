"""`python -m runtime.cli`, where the command `edgezmq` is not on the path."""

from runtime.cli import main

main()
