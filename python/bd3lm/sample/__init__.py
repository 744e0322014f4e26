"""Text from a trained model."""

from bd3lm.sample.events import Sample
from bd3lm.sample.sampler import Sampler

__all__ = ["Sample", "Sampler"]
