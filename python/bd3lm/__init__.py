"""Block-diffusion language models: train, score and sample.

Core objects:

- :class:`TrainConfig` holds every setting of a run; :func:`preset` returns one by name.
- :func:`train` runs it: data, training, likelihood, samples.
- :func:`load_checkpoint` opens its checkpoint; :class:`Checkpoint` generates and scores text.
- :class:`Sampler` draws many rows at once; :func:`score` returns likelihoods.
- :class:`Schedule` is a noise schedule, built in or your own.

Quick start::

    import bd3lm

    bd3lm.train(bd3lm.preset("demo", data="book.txt", steps=200), "runs/book")
    checkpoint = bd3lm.load_checkpoint("runs/book")
    print(checkpoint.generate("The old house", length=64)[0].text)

Names are imported when they are first used, so ``import bd3lm`` does not import PyTorch.
"""

from typing import TYPE_CHECKING

from bd3lm.lazy import imported_on_use

if TYPE_CHECKING:
    from bd3lm import errors
    from bd3lm._version import __version__
    from bd3lm.api import Checkpoint, load_checkpoint, train
    from bd3lm.config import SampleConfig, TrainConfig, preset
    from bd3lm.data import Schedule, load_tokenizer, prepare
    from bd3lm.evaluate import score
    from bd3lm.sample import Sample, Sampler
    from bd3lm.training import Callback

__all__ = [
    "Callback",
    "Checkpoint",
    "Sample",
    "SampleConfig",
    "Sampler",
    "Schedule",
    "TrainConfig",
    "__version__",
    "errors",
    "load_checkpoint",
    "load_tokenizer",
    "prepare",
    "preset",
    "score",
    "train",
]

__getattr__ = imported_on_use(
    "bd3lm",
    {
        "Callback": "training",
        "Checkpoint": "api",
        "Sample": "sample",
        "SampleConfig": "config",
        "Sampler": "sample",
        "Schedule": "data",
        "TrainConfig": "config",
        "__version__": "_version",
        "errors": "",
        "load_checkpoint": "api",
        "load_tokenizer": "data",
        "prepare": "data",
        "preset": "config",
        "score": "evaluate",
        "train": "api",
    },
)


def __dir__() -> list[str]:
    """List the public names for completion."""
    return sorted(__all__)
