"""What is promised in docs/reliability.md, attacked: short forms here, long ones marked slow."""
