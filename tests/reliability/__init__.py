"""Attacks on the promises of docs/reliability.md: short forms here, long ones marked slow."""
