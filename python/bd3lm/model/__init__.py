"""The one Transformer and its attention."""
