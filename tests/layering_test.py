"""The packages depend on each other, and on other distributions, only as the design says.

proto -> core -> layers -> {train, serve, export}; and some distributions have one importer.
Reads the working tree, so that a file that no BUILD file names is seen too.
"""

import ast
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# package -> what it may import of pippin
DIRECTION = {
    "core": {"v1", "core"},
    "layers": {"v1", "core", "layers"},
    "train": {"v1", "core", "layers", "train"},
    "serve": {"v1", "core", "layers", "serve"},
    "export": {"v1", "core", "layers", "export"},
}

# module -> the only package that may import it
ONLY_IMPORTER = {
    "orbax": "core",
    "jax.experimental.pallas": "layers",
    "optax": "train",
    "seqio": "train",
    "tensorflow": "train",
    "grpc": "serve",
    "coremltools": "export",
    "coreai": "export",
}

# Importing these takes 15 s: one file does, with its test.
ONE_FILE = ["seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text"]

# coremltools imports these wherever they are installed, unless it is imported by this file.
COREMLTOOLS_FILE = "packages/export/pippin/export/coreml_tools.py"
# Runs on a Mac, where nothing of pippin is.
COREMLTOOLS_SCRIPT = "packages/export/pippin/export/mac/verify_on_mac.py"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Python file of a package and the modules that it imports, at its top or within a function."""

    path: pathlib.Path
    package: str
    imports: frozenset[str]

    @property
    def is_shipped(self) -> bool:
        """It is in the wheel: neither a test, nor a helper of tests, nor a script that a test runs."""
        targets = declared(self.path.parent)
        helper = targets.get(self.path.stem, {}).get("testonly", False)
        script = self.path.name in listed(targets, "data", "test_data")
        return not (helper or script or self.path.stem.endswith("_test"))

    def uses(self, module: str) -> bool:
        return any(f"{name}.".startswith(f"{module}.") for name in self.imports)


def imported(tree: ast.AST) -> frozenset[str]:
    """The dotted names that a file imports; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


# top-level module -> the distributions that have it; walking them takes seconds.
offers = functools.cache(importlib.metadata.packages_distributions)


@functools.cache
def declared(folder: pathlib.Path) -> dict[str, dict]:
    """What a folder's BUILD file declares, name -> arguments; all_modules under its own name."""
    build = ROOT / folder / "BUILD"
    calls = {}
    for statement in ast.parse(build.read_text()).body if build.exists() else ():
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            literal = {k.arg: _literal(k.value) for k in call.keywords}
            calls[literal.get("name") or ast.unparse(call.func)] = literal
    return calls


def listed(targets: dict[str, dict], *attributes: str) -> set[str]:
    """All that the targets of a folder list under some of their attributes."""
    return {name for target in targets.values() for a in attributes for name in target.get(a) or ()}


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:  # glob(...), a sum of lists: of no interest here
        return None


@functools.cache
def sources() -> tuple[Source, ...]:
    return tuple(
        Source(path.relative_to(ROOT), package, imported(ast.parse(path.read_bytes(), path)))
        for package in DIRECTION
        for path in sorted((ROOT / "packages" / package / "pippin").rglob("*.py"))
    )


def of(package: str) -> list[Source]:
    return [source for source in sources() if source.package == package]


@pytest.mark.parametrize("package", DIRECTION)
def test_imports_follow_the_direction_of_dependence(package):
    wrong = [
        f"{source.path} imports {name}"
        for source in of(package)
        for name in sorted(source.imports)
        if name.startswith("pippin.") and name.split(".")[1] not in DIRECTION[package]
    ]
    assert not wrong


@pytest.mark.parametrize("module", ONLY_IMPORTER)
def test_a_module_with_one_importer_has_no_other(module):
    wrong = [str(s.path) for s in sources() if s.uses(module) and s.package != ONLY_IMPORTER[module]]
    assert not wrong


def test_the_engine_of_serve_knows_neither_arrays_nor_protocols():
    wrong = [
        str(s.path)
        for s in of("serve")
        if s.path.parent.name == "engine" and any(s.uses(module) for module in ("jax", "flax", "grpc"))
    ]
    assert not wrong


def test_grpc_stays_at_the_edge_of_serve():
    edge = ("server", "client")
    wrong = [
        str(s.path)
        for s in of("serve")
        if s.is_shipped and s.uses("grpc") and s.path.parent.name != "rpc" and s.path.stem not in edge
    ]
    assert not wrong


def test_http_and_grpc_know_nothing_of_each_other():
    wrong = [
        str(s.path)
        for s in of("serve")
        if s.is_shipped and s.path.parent.name != "http" and (s.uses("starlette") or s.uses("uvicorn"))
    ]
    assert not wrong


def test_one_file_imports_seqio_and_tensorflow():
    importers = {s.path for s in sources() if any(s.uses(module) for module in ONE_FILE)}
    files = {path.with_stem(path.stem.removesuffix("_test")) for path in importers}
    assert len(files) <= 1, sorted(map(str, importers))


def test_one_file_imports_coremltools():
    assert {str(s.path) for s in sources() if s.uses("coremltools")} <= {COREMLTOOLS_FILE, COREMLTOOLS_SCRIPT}


@pytest.mark.parametrize("package", DIRECTION)
def test_each_package_declares_what_it_imports(package):
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    promised = {distribution(re.split(r"[^\w.-]", text)[0]) for text in project["dependencies"]}
    used = set()
    missing = []
    for source in of(package):
        if not source.is_shipped:
            continue
        for name in sorted(source.imports):
            top, *rest = name.split(".")
            if top in sys.stdlib_module_names or (top == "pippin" and (not rest or rest[0] == package)):
                continue
            names = (
                {f"pippin-{'proto' if rest[0] == 'v1' else rest[0]}"}
                if top == "pippin"
                else offers().get(top, [])
            )
            found = {distribution(name) for name in names} & promised
            used |= found
            if not found:
                missing.append(f"{source.path} imports {name}")
    assert not missing
    if used:
        assert promised == used, f"declared and not imported: {sorted(promised - used)}"


def distribution(name: str) -> str:
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pippin_is_a_namespace_package():
    assert not [*ROOT.glob("packages/*/pippin/__init__.py"), *ROOT.glob("proto/pippin/__init__.py")]


def test_every_file_has_a_target():
    missing = []
    for source in sources():
        folder, stem = source.path.parent, source.path.stem
        targets = declared(folder)
        together = listed(targets, "srcs", "data", "test_data")
        if stem == "__init__":
            found = folder.parent.name == "pippin" or folder.name in targets_above(folder)
        else:
            found = stem in targets or stem.removesuffix("_test") in targets or source.path.name in together
        if not found or not targets:
            missing.append(str(source.path))
    assert not missing, "in no BUILD file, or their folder is not in the all_modules() of the folder above"


def targets_above(folder: pathlib.Path) -> list[str]:
    return declared(folder.parent).get("all_modules", {}).get("folders") or []
