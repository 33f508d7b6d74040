"""Counts lines: those that changed in existing modules, those of a modifier, those that name a component.

Definitions:

    existing module   a source file of pippin.core or pippin.layers, tests left out. The report runs on a
                      copy of them, made when it starts
    lines changed     lines added plus lines removed between two snapshots of the existing modules, as
                      `git diff --numstat` counts them
    functions changed names in the loaded existing modules that stand for another function or class, or whose
                      code is another, than in the first snapshot: what a patch at run time changes
    modifier lines    lines with code (no blank lines, comments, docstrings) of the modifier, of the
                      functions beside it that it uses, and of the imports that it needs
    mentions          lines of existing modules with the name of a component in their code (comments and
                      docstrings left out), in files other than those that declare it
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import io
import re
import shutil
import sys
import tokenize
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXISTING = ("pippin.core", "pippin.layers")

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_NO_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}


def use_copy(folder: Path) -> None:
    """Copies the existing modules to a folder, and makes this process import them from there.

    Who edits the originals meanwhile changes nothing that is counted.
    """
    loaded = [name for name in sys.modules if name.startswith(EXISTING)]
    assert not loaded, f"imported before the copy was made: {loaded}"
    for package in EXISTING:
        shutil.copytree(_folder(package), folder / package.replace(".", "/"))
    sys.path.insert(0, str(folder))


def read_sources() -> dict[str, str]:
    """The text of every existing module, by its path from the import root, such as pippin/core/config.py."""
    sources: dict[str, str] = {}
    for package in EXISTING:
        sources.update(read_folder(_folder(package), package.replace(".", "/") + "/"))
    return sources


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return Path(spec.origin).parent


def read_folder(folder: Path, prefix: str = "") -> dict[str, str]:
    """The text of every Python file below a folder, tests left out, by its path in the folder after a prefix."""
    return {
        f"{prefix}{path.relative_to(folder)}": path.read_text()
        for path in sorted(folder.rglob("*.py"))
        if not path.stem.endswith("_test")
    }


def changed_lines(before: dict[str, str], after: dict[str, str]) -> dict[str, int]:
    """The lines changed in each file that changed. A file that is new or gone counts with all its lines."""
    changed = {}
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path, "").splitlines(), after.get(path, "").splitlines()
        if old != new:
            lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[
                2:
            ]  # without the two of the header
            changed[path] = sum(line[0] in "+-" for line in lines)
    return changed


def loaded_functions() -> dict[str, Any]:
    """What every function, method and class name of the loaded existing modules stands for, by full name."""
    found: dict[str, Any] = {}
    for name, module in sorted(sys.modules.items()):
        if name.startswith(EXISTING) and not name.endswith("_test"):
            for attribute, value in vars(module).items():
                found.update(_code(f"{name}:{attribute}", value, name))
    return found


def changed_functions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names that stand for other code. Modules that were first loaded in between do not count."""
    modules = {name.partition(":")[0] for name in before}
    names = before.keys() | {n for n in after if n.partition(":")[0] in modules}
    return sorted(n for n in names if before.get(n) != after.get(n))


def _code(name: str, value: Any, module: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, type):
        yield name, f"{value.__module__}.{value.__qualname__}"
        if value.__module__ == module:
            for attribute, member in list(vars(value).items()):
                if not isinstance(member, type):
                    yield from _code(f"{name}.{attribute}", member, module)
        return
    for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
        chain = []  # through decorators, down to the function that was written
        while function is not None:
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType):
                chain.append(code)
            function = getattr(function, "__wrapped__", None)
        if chain:
            yield name, tuple(chain)


def modifier_lines(modifier: Callable[..., Any]) -> list[str]:
    """The lines that a user writes for a modifier: see the module for what counts."""
    module = inspect.getmodule(modifier)
    assert module is not None
    text = inspect.getsource(module)
    lines = text.splitlines()
    top = {name: node for node in ast.parse(text).body for name in _binds(node)}
    reached: dict[str, ast.stmt] = {}
    names = [modifier.__name__]
    while names:
        name = names.pop()
        if name in top and name not in reached:
            reached[name] = node = top[name]
            if not isinstance(node, ast.Import | ast.ImportFrom):
                names += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    counted = []
    for node in sorted(set(reached.values()), key=lambda node: node.lineno):
        if isinstance(node, ast.Import | ast.ImportFrom):
            # As it would stand in a file with this modifier alone: one line, of the names that it needs.
            node.names = [a for a in node.names if _bound(a) in reached]
            counted.append(ast.unparse(node))
        else:
            counted += [
                lines[i - 1] for i in code_lines(ast.get_source_segment(text, node) or "", node.lineno)
            ]
    return counted


def _binds(node: ast.stmt) -> list[str]:
    """The names that a top-level statement gives a meaning to."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [_bound(a) for a in node.names]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _bound(alias: ast.alias) -> str:
    return (alias.asname or alias.name).partition(".")[0]


def code_lines(text: str, first: int = 1) -> list[int]:
    """The numbers of the lines with code: neither blank, nor comment, nor docstring. The text's first is `first`."""
    return sorted({line + first - 1 for line, _ in _code_tokens(text)})


def mentions(component: type, sources: dict[str, str]) -> dict[str, int]:
    """How many lines name a component or its config, by file; the files that declare them left out."""
    config = component.Config  # type: ignore[attr-defined]
    names = {component.__name__} | ({config.__name__} - {"Config"})
    own = {cls.__module__.replace(".", "/") + ".py" for cls in (component, config)}
    return {
        path: count
        for path, text in sources.items()
        if path not in own
        and (
            count := len(
                {line for line, token in _code_tokens(text) if names & set(re.findall(r"\w+", token))}
            )
        )
    }


def holders(component: type) -> list[str]:
    """The loaded existing modules with a name that stands for what the component's module defines."""
    return sorted(
        name
        for name, module in sys.modules.items()
        if name.startswith(EXISTING)
        and name != component.__module__
        and any(getattr(value, "__module__", None) == component.__module__ for value in vars(module).values())
    )


def _code_tokens(text: str) -> Iterator[tuple[int, str]]:
    """Every line that a token of code covers, with the token."""
    docstrings = {
        (statement.lineno, statement.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body
        if isinstance(statement := node.body[0], ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE and token.start not in docstrings:
            for line in range(token.start[0], token.end[0] + 1):
                yield line, token.string
