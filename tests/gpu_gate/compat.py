"""Lets Triton's interpreter run with a NumPy that is newer than it."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Read a loop bound with ``item()``, as newer Tritons do.

    Up to Triton 3.6 it is ``int(array of shape (1,))``, which NumPy 2.4 refuses. Calling this
    twice, or with a newer Triton, changes nothing.
    """
    install = interpreter._patch_lang_tensor
    if len(inspect.signature(install).parameters) > 1 or hasattr(install, "patched"):
        return

    def patched(tensor: Any) -> None:
        install(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    patched.patched = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
