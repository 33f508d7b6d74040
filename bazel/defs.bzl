"""The macros of the packages' BUILD files: one target for each Python file.

How to add a file, say packages/core/pippin/core/mesh.py:

1. Write mesh.py and, beside it, mesh_test.py.
2. In the BUILD file of their folder, in alphabetical order:

       py_module(
           name = "mesh",
           deps = [":errors", "@pip//:jax"],     # what mesh.py imports, exactly
           test_deps = ["@pip//:numpy"],         # what only mesh_test.py imports
           visibility = ["//packages/core:users"],  # only if another package imports it
       )

   This makes :mesh and, since mesh_test.py exists, the test :mesh_test.
3. ./bazelw test //packages/core/pippin/core:mesh_test

A target is private to its folder unless `visibility` says more. A new distribution
also goes into requirements.in (then ./bazelw run //:lock) and into the package's
pyproject.toml. A new folder gets its own BUILD file, which ends with all_modules(),
and is named in the all_modules() of the folder above: all_modules(folders = ["models"]).
"""

load("//bazel:python.bzl", "py_binary", "py_library", "py_test")

def _namespace(package):
    """The import root of a folder and its dotted name, from its Bazel package."""
    parts = package.split("/")
    if "pippin" not in parts:
        fail("py_module is for folders under packages/*/pippin, not //%s" % package)
    names = parts[parts.index("pippin"):]
    return "/".join([".."] * len(names)), ".".join(names)

def _init(package):
    """The target of this folder's __init__.py, made at its first use."""
    if not native.existing_rule("__init__"):
        root, dotted = _namespace(package)
        parent = package.rpartition("/")[0]
        py_library(
            name = "__init__",
            srcs = ["__init__.py"],
            data = native.glob(["py.typed"]),
            imports = [root],
            init = "//%s:__init__" % parent if dotted.count(".") > 1 else None,
            visibility = ["//packages:__subpackages__"],
        )
    return ":__init__"

def py_module(
        name,
        deps = [],
        data = [],
        binary = False,
        overlays = [],
        test = True,
        test_deps = [],
        test_data = [],
        test_env = {},
        test_overlays = [],
        test_peers = [],
        test_size = "medium",
        test_tags = [],
        testonly = False,
        visibility = ["//visibility:private"]):
    """The library `name` of `name`.py and, where `name`_test.py exists, its test.

    Args:
        name: the file's name, less .py.
        deps: what it imports.
        data: files that it reads.
        binary: it has a main; `bazel run` runs it, and others may still import it.
        overlays: of a binary: environments beside @pip, such as @accelerator//:overlay.
        test: whether `name`_test.py gets a target of its own; False where a py_tests has it.
        test_deps: what only the test imports.
        test_data: what only the test reads or runs.
        test_env: the test's environment.
        test_overlays: the test's.
        test_peers: targets of @peers (transformers, torch): see py_test.
        test_size: small is two minutes at most, medium ten, large thirty.
        test_tags: the test's tags.
        testonly: only tests may depend on it.
        visibility: who may depend on it.
    """
    root, dotted = _namespace(native.package_name())
    common = dict(
        name = name,
        srcs = [name + ".py"],
        data = data,
        imports = [root],
        init = _init(native.package_name()),
        testonly = testonly,
        visibility = visibility,
        deps = deps,
    )
    if binary:
        py_binary(module = dotted + "." + name, overlays = overlays, **common)
    else:
        py_library(**common)
    if test and native.glob([name + "_test.py"]):
        py_tests(
            name = name + "_test",
            srcs = [name + "_test.py"],
            data = test_data,
            env = test_env,
            overlays = test_overlays,
            peers = test_peers,
            size = test_size,
            tags = test_tags,
            deps = [":" + name] + [d for d in deps if d not in test_deps] + test_deps,
        )

def py_tests(name, srcs, **kwargs):
    """A test of several files: cheaper than one each, where they take long to import.

    Args:
        name: the target's name.
        srcs: the test files.
        **kwargs: see py_test.
    """
    root, _ = _namespace(native.package_name())
    py_test(
        name = name,
        srcs = srcs,
        imports = [root],
        init = _init(native.package_name()),
        **kwargs
    )

# buildifier: disable=unnamed-macro
def all_modules(folders = []):
    """The last line of a BUILD file: the target :all_modules, all that the folder ships, less what is tagged manual.

    The package's wheel holds it, and its types_test reads it. A test that builds configs,
    which name their implementations by string, has it in its `test_data`.

    Args:
        folders: folders in this one with BUILD files of their own, whose modules count here too.
    """
    _init(native.package_name())
    modules = [
        name
        for name, rule in native.existing_rules().items()
        if rule["kind"] in ["py_library", "_py_binary"] and not rule.get("testonly") and "manual" not in rule.get("tags", [])
    ]
    py_library(
        name = "all_modules",
        visibility = ["//packages/%s:users" % native.package_name().split("/")[1]],
        deps = modules + ["//%s/%s:all_modules" % (native.package_name(), folder) for folder in folders],
    )

def types_test(name, deps):
    """A test that pyright finds nothing in this folder. Its tests are left out: they run.

    Args:
        name: the target's name.
        deps: targets with the folder's sources.
    """
    py_test(
        name = name,
        srcs = ["//tools:types_test.py"],
        env = {"FOLDER": native.package_name()},
        deps = deps + ["@pip//:basedpyright"],
    )
