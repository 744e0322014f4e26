"""Version of the installed package; Cargo.toml is where it is set."""

from importlib.metadata import version

__version__ = version("bd3lm")
