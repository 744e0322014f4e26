"""Marks for ``torch.compile``, set without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

MARK = "_dynamo_marked_constant"
"""Attribute of a function that the compiler reads."""

F = TypeVar("F", bound=Callable[..., Any])


def fixed_while_compiling(function: F) -> F:
    """A function that the compiler calls, and takes the result of for a constant.

    It is ``torch.compiler.assume_constant_result``, which imports the compiler and Triton: a
    second and 100 MB for those who never compile.
    """
    setattr(function, MARK, True)
    return function
