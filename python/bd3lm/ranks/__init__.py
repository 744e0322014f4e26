"""The processes of a job: their places, what they exchange, and the one that hangs."""
