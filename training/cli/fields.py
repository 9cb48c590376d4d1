"""Reads the settings dataclasses: their keys, types and docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, its type, and the dataclass that defines it."""

    name: str
    type: Any
    owner: Any
    is_sentence: bool = False
    """Whether it is free text, taken as typed."""

    @property
    def doc(self) -> str:
        """The docstring of the field."""
        return field_docs(self.owner).get(self.name.rpartition(".")[2], "")

    @property
    def is_text(self) -> bool:
        """Whether it is a string or an optional string, such as a name or path."""
        return self.type is str or set(typing.get_args(self.type)) == {str, type(None)}

    @property
    def is_open(self) -> bool:
        """Whether it is a mapping with arbitrary keys."""
        return typing.get_origin(self.type) is dict


def keys_of(root: type) -> dict[str, Key]:
    """Return all keys of a config class by dotted name, including sections, in source order."""
    return _keys_of(root)  # mypy takes no dataclass for an argument of a cached function


@functools.cache
def _keys_of(root: type) -> dict[str, Key]:
    return {key.name: key for key in _walk(root, "")}


def _walk(root: type, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(root)
    for item in fields(root):
        kind = hints[item.name]
        yield Key(prefix + item.name, kind, root, item.metadata.get("sentences", False))
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{item.name}.")


@functools.cache
def field_docs(root: type) -> dict[str, str]:
    """Return the docstring that follows each field in the source of a dataclass and its bases, by field name."""
    docs: dict[str, str] = {}
    for cls in reversed(root.__mro__):
        if is_dataclass(cls):
            docs |= _docs_in_source(cls)
    return docs


def _docs_in_source(cls: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
        else:
            name = ""
    return docs


def type_words(kind: Any) -> str:
    """Describe a type in words: "an integer", "a list, each element text: [a,b]", "text or null"."""
    if kind in WORDS:
        return WORDS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_words(a) for a in arguments)
    if origin is list:
        return f"a list, each element {type_words(arguments[0])}: [a,b]"
    if origin is dict:
        return "a mapping such as {name: value}"
    if is_dataclass(kind):
        return "a section; its keys are " + ", ".join(f.name for f in fields(kind))
    return "any value"
