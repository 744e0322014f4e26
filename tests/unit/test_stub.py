"""The stub matches the extension, and everything in it has its wrapper."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import bd3lm
from bd3lm import _core

PACKAGE = Path(bd3lm.__file__).parent
STUB = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
Signature = list[tuple[str, str]]


def from_stub(function: ast.FunctionDef) -> Signature:
    """Names and kinds of the parameters, `self` and `cls` left out."""
    a = function.args
    names = [(x.arg, "positional") for x in a.posonlyargs + a.args] + [
        (x.arg, "keyword") for x in a.kwonlyargs
    ]
    return [x for x in names if x[0] not in ("self", "cls")]


def defaults_in_stub(function: ast.FunctionDef) -> dict[str, object]:
    a = function.args
    pairs = [
        *zip(a.args[::-1], a.defaults[::-1], strict=False),
        *zip(a.kwonlyargs, a.kw_defaults, strict=True),
    ]
    return {x.arg: ast.literal_eval(value) for x, value in pairs if value is not None}


def from_extension(signature: inspect.Signature) -> Signature:
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [
        (p.name, "keyword" if p.kind is keyword else "positional")
        for p in signature.parameters.values()
    ]
    return [x for x in names if x[0] not in ("self", "cls")]


def defaults_in_extension(signature: inspect.Signature) -> dict[str, object]:
    found = signature.parameters.values()
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


def stub_members(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def same(function: ast.FunctionDef, signature: inspect.Signature, where: str) -> None:
    assert from_stub(function) == from_extension(signature), where
    assert defaults_in_stub(function) == defaults_in_extension(signature), where


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


def test_the_same_names() -> None:
    nodes = {x.name for x in STUB.body if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    nodes |= {ast.unparse(x.target) for x in STUB.body if isinstance(x, ast.AnnAssign)}
    assert nodes == public(vars(_core))


def test_the_same_functions() -> None:
    functions = [x for x in STUB.body if isinstance(x, ast.FunctionDef)]
    assert functions
    for function in functions:
        same(function, inspect.signature(getattr(_core, function.name)), function.name)


def test_the_same_classes() -> None:
    classes = [x for x in STUB.body if isinstance(x, ast.ClassDef)]
    assert classes
    for node in classes:
        made = getattr(_core, node.name)
        members = stub_members(node)
        assert public(members) == public(vars(made)), node.name
        assert ("__len__" in members) == hasattr(made, "__len__"), node.name
        assert ("__new__" in members) == (made.__text_signature__ is not None), node.name
        if "__new__" in members:
            same(members["__new__"], inspect.signature(made), node.name)
        for name in public(members):
            where = f"{node.name}.{name}"
            attribute = inspect.getattr_static(made, name)
            assert is_property(members[name]) == inspect.isgetsetdescriptor(attribute), where
            if not is_property(members[name]):
                same(members[name], inspect.signature(getattr(made, name)), where)


def test_every_export_has_a_wrapper() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in public(vars(_core)):
        assert re.search(rf"\b_core\.{name}\b", sources), f"nothing uses _core.{name}"
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            for name in public(stub_members(node)):
                assert re.search(rf"\.{name}\b", sources), f"nothing uses {node.name}.{name}"
