"""Classes for the transformers package (the extra ``hf``)."""
