"""The flat room: everything that travels with a checkpoint (rules in CONTRIBUTING.md, enforced by a test)."""
