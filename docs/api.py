"""Writes docs/api.md from the docstrings of what `cascade_t2i` exports: `python docs/api.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import cascade_t2i

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

    from cascade_t2i import Cascade, ShardStream, evaluate

Written from the docstrings by `python docs/api.py`. A test holds it to them; what is not listed here may move.
"""


def page() -> str:
    """The page as it should be."""
    return "\n".join([HEAD, *(_entry(name, getattr(cascade_t2i, name), "##") for name in cascade_t2i.__all__)])


def _entry(name: str, thing: Any, mark: str) -> str:
    kind = "class " if inspect.isclass(thing) else ""
    lines = [f"{mark} {name.rpartition('.')[2]}", "", f"```python\n{kind}{name}{_signature(thing)}\n```", ""]
    lines += [_prose(inspect.getdoc(thing) or ""), ""]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        named = [(name, member) for cls in reversed(_own_bases(thing)) for name, member in vars(cls).items()]
        members = {n: m for n, m in named if n[0] != "_" or (n == "__call__" and m.__doc__)}
        for member in members:
            found = getattr(thing, member)
            if callable(found) and inspect.getdoc(found):
                lines.append(_entry(f"{name}.{member}", found, "###"))
    return "\n".join(lines)


def _own_bases(thing: type) -> list[type]:
    return [cls for cls in thing.__mro__ if cls.__module__.partition(".")[0] in ("training", "data_pipeline")]


def _signature(thing: Any) -> str:
    if inspect.isclass(thing) and thing.__init__ is Exception.__init__:
        return "(message)"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))  # annotations are kept as text
    return text.replace("(self)", "()").replace("(self, ", "(")


def _prose(text: str) -> str:
    """Google's headings in bold; indented lines stay as they are, in a block of their own."""
    text = re.sub(r"^(Args|Returns|Raises|Yields):\n", r"**\1**\n\n", text, flags=re.MULTILINE)
    return re.sub(r"(\S)\n( {4}\S)", r"\1\n\2", text)


if __name__ == "__main__":
    PAGE.write_text(page())
