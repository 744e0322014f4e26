"""Text from a trained model."""

from bd3lm.sample.sampler import Sample, Sampler

__all__ = ["Sample", "Sampler"]
