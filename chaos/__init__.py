"""`make chaos`: whole nodes under load, everything that can be done to them, and what became of each message."""
