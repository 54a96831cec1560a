"""Fuzzing of everything that decodes bytes from outside; see docs/fuzzing.md."""
