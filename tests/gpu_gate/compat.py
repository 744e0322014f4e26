"""Lets Triton's interpreter run with a NumPy that is newer than it."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Read a loop bound with ``item()``.

    Up to Triton 3.6 it is ``int(array of shape (1,))``, which NumPy 2.4 refuses. Calling this
    twice changes nothing.
    """
    install = interpreter._patch_lang_tensor
    if hasattr(install, "patched"):
        return

    def read(tensor: Any) -> int:
        return int(tensor.handle.data.item())

    def patched(tensor: Any, *scope: Any) -> None:
        install(tensor, *scope)
        if scope:  # since Triton 3.6; it restores the attribute after the kernel
            scope[0].set_attr(tensor, "__index__", read)
        else:
            tensor.__index__ = read

    patched.patched = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
