"""The processes of a job: their places, their exchanges, and the watch for one that hangs."""
