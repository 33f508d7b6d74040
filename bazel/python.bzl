"""py_library, py_binary and py_test, on the interpreter of @pip.

BUILD files of the packages use the macros in //bazel:defs.bzl instead.

They take the attributes of the rules of the same names in rules_python that
this repository needs, and need no other repository: neither rules_python nor
what Bazel's own Python rules load (rules_cc, rules_java), so that a build
downloads nothing but the distributions in requirements.lock.

Each target's imports are checked against its direct deps (check_imports.py).
"""

PythonInfo = provider(
    doc = "What a Python program needs to run.",
    fields = {
        "imports": "depset of folders for sys.path, relative to the runfiles folder",
        "provided": "depset of lists of the files that a direct dependent may import",
        "sources": "depset of this repository's Python files",
    },
)

def _runfiles_path(ctx, file):
    path = file.short_path
    return path[len("../"):] if path.startswith("../") else ctx.workspace_name + "/" + path

def _import_path(ctx, folder):
    parts = [ctx.workspace_name] + [p for p in ctx.label.package.split("/") if p]
    for part in folder.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    if not parts:
        fail("imports: %s leaves the repository" % folder)
    return "/".join(parts)

def python_info(ctx, files, imports, deps):
    """PythonInfo of a target and of its deps.

    Args:
        ctx: the target's context.
        files: its Python files.
        imports: folders for sys.path, relative to its package.
        deps: the targets that it depends on.

    Returns:
        A PythonInfo.
    """
    deps = [dep[PythonInfo] for dep in deps]
    roots = depset(
        [_import_path(ctx, folder) for folder in imports],
        transitive = [dep.imports for dep in deps],
    )
    if files:
        provided = ctx.actions.declare_file(ctx.label.name + ".provided")
        ctx.actions.write(provided, "".join([
            path[len(root) + 1:] + "\n"
            for path in [_runfiles_path(ctx, file) for file in files]
            for root in roots.to_list()
            if path.startswith(root + "/")
        ]))
        provided = depset([provided])
    else:  # A target without files stands for its deps.
        provided = depset(transitive = [dep.provided for dep in deps])
    return PythonInfo(
        imports = roots,
        provided = provided,
        sources = depset(files, transitive = [dep.sources for dep in deps]),
    )

def _own_info(ctx):
    init = [ctx.attr.init] if ctx.attr.init else []
    return python_info(ctx, ctx.files.srcs, ctx.attr.imports, ctx.attr.deps + init)

def _check_imports(ctx, info):
    done = ctx.actions.declare_file(ctx.label.name + ".imports_checked")
    provided = depset(transitive = [info.provided] + [d[PythonInfo].provided for d in ctx.attr.deps])
    arguments = ctx.actions.args()
    arguments.add(ctx.label)
    arguments.add(done)
    arguments.add_all(ctx.files.srcs)
    arguments.add("--")
    arguments.add_all(provided)
    ctx.actions.run_shell(
        # Not a py_binary: those are checked themselves.
        command = '"$(dirname "$(readlink -f "$1")")/venv/bin/python" -IS "${@:2}"',
        arguments = [ctx.file._python.path, ctx.file._check.path, arguments],
        inputs = depset(ctx.files.srcs + [ctx.file._python, ctx.file._check], transitive = [provided]),
        outputs = [done],
        mnemonic = "PyImports",
        progress_message = "Checking the imports of %s" % ctx.label,
    )
    return OutputGroupInfo(_validation = depset([done]))

def _runfiles(ctx, files = []):
    runfiles = ctx.runfiles(files = files + ctx.files.data)
    for target in ctx.attr.deps + ctx.attr.data + ([ctx.attr.init] if ctx.attr.init else []):
        runfiles = runfiles.merge(target[DefaultInfo].default_runfiles)
    return runfiles

def _py_library_impl(ctx):
    info = _own_info(ctx)
    return [
        DefaultInfo(files = depset(ctx.files.srcs), runfiles = _runfiles(ctx, ctx.files.srcs)),
        info,
        _check_imports(ctx, info),
    ]

_LIBRARY_ATTRS = {
    "data": attr.label_list(allow_files = True),
    "deps": attr.label_list(providers = [PythonInfo]),
    "imports": attr.string_list(doc = "Folders for sys.path, relative to this package."),
    "init": attr.label(
        doc = "The __init__.py of the same folder. Unlike one of deps, it allows no import.",
        providers = [PythonInfo],
    ),
    "srcs": attr.label_list(allow_files = [".py", ".pyi"]),
    "_check": attr.label(default = "//bazel:check_imports.py", allow_single_file = True),
    "_python": attr.label(default = "@pip//:python.txt", allow_single_file = True),
}

py_library = rule(
    implementation = _py_library_impl,
    attrs = _LIBRARY_ATTRS,
)

def _launch(ctx, main, files, arguments):
    """The launcher of an executable target.

    Args:
        ctx: the target's context.
        main: what Python runs, as text for bash.
        files: files that it needs beside the target's own.
        arguments: paths in the runfiles folder, passed before the user's arguments.

    Returns:
        The target's providers.
    """
    info = _own_info(ctx)
    launcher = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.expand_template(
        template = ctx.file._launcher,
        output = launcher,
        is_executable = True,
        substitutions = {
            "%ARGUMENTS%": " ".join(['"$runfiles/%s"' % a for a in arguments]),
            "%ENV%": "\n".join(
                ["export %s='%s'" % (k, v) for k, v in ctx.attr.env.items()] +
                [_export_python(ctx, marker.files, k) for marker, k in ctx.attr.interpreters.items()] +
                [_add_overlay(ctx, f) for f in ctx.files.overlays if f.basename == "python.txt"],
            ),
            "%IMPORTS%": ":".join(["$runfiles/" + i for i in info.imports.to_list()]),
            "%MAIN%": main,
            "%PYTHON%": _runfiles_path(ctx, ctx.file._python),
        },
    )
    return [
        DefaultInfo(
            executable = launcher,
            files = depset([launcher]),
            runfiles = _runfiles(ctx, files + [ctx.file._python] + ctx.files.interpreters + ctx.files.overlays + ctx.files.srcs),
        ),
        info,
        _check_imports(ctx, info),
    ]

def _export_python(ctx, marker, variable):
    """Sets a variable to the interpreter beside a marker such as @peers//:python.txt."""
    path = _runfiles_path(ctx, marker.to_list()[0])
    return 'export %s=$(dirname "$(readlink -f "$runfiles/%s")")/venv/bin/python' % (variable, path)

def _add_overlay(ctx, marker):
    """Adds the distributions beside a marker such as @libtpu//:python.txt to those of @pip."""
    site = 'echo "$(dirname "$(readlink -f "$runfiles/%s")")"/venv/lib/python*/site-packages' % _runfiles_path(ctx, marker)
    return "export PYTHONPATH=$PYTHONPATH:$(%s)" % site

def _script(ctx, file):
    return '"$runfiles/%s"' % _runfiles_path(ctx, file)

def _py_binary_impl(ctx):
    if ctx.attr.module:
        return _launch(ctx, "-m " + ctx.attr.module, [], [])
    main = ctx.file.main
    if not main:
        named = [f for f in ctx.files.srcs if f.basename in (ctx.label.name + ".py", "__main__.py")]
        main = (named or ctx.files.srcs)[0]
    return _launch(ctx, _script(ctx, main), [main], [])

def _py_test_impl(ctx):
    return _launch(
        ctx,
        _script(ctx, ctx.file._pytest),
        [ctx.file._pytest] + ctx.files._config,
        [_runfiles_path(ctx, f) for f in ctx.files.srcs],
    )

_EXECUTABLE_ATTRS = dict(
    _LIBRARY_ATTRS,
    env = attr.string_dict(),
    interpreters = attr.label_keyed_string_dict(
        allow_files = True,
        doc = "The python.txt of other environments -> the variables that name their interpreters.",
    ),
    overlays = attr.label_list(
        allow_files = True,
        doc = "Environments whose distributions are importable beside those of @pip, such as @libtpu//:overlay.",
    ),
    _launcher = attr.label(default = "//bazel:launcher.sh.tpl", allow_single_file = True),
)

_py_binary = rule(
    implementation = _py_binary_impl,
    attrs = dict(
        _EXECUTABLE_ATTRS,
        main = attr.label(allow_single_file = [".py"]),
        module = attr.string(doc = "Run this module, as python -m, rather than main."),
    ),
    executable = True,
)

_py_test = rule(
    implementation = _py_test_impl,
    attrs = dict(
        _EXECUTABLE_ATTRS,
        _config = attr.label_list(default = ["//:conftest.py", "//:pyproject.toml"], allow_files = True),
        _pytest = attr.label(default = "//bazel:pytest_main.py", allow_single_file = True),
    ),
    test = True,
)

def _with_peers(peers, kwargs):
    """Adds what `peers` stands for: the distributions, their interpreter, and a tag."""
    if peers:
        kwargs["data"] = kwargs.get("data", []) + peers
        kwargs["interpreters"] = {"@peers//:python.txt": "PIPPIN_PEERS_PYTHON"}
        kwargs["tags"] = kwargs.get("tags", []) + ["peers"]
    return kwargs

def py_binary(name, peers = [], **kwargs):
    """A program.

    Args:
        name: the target's name.
        peers: targets of @peers. PIPPIN_PEERS_PYTHON names the interpreter that imports them.
        **kwargs: see the rule.
    """
    _py_binary(name = name, **_with_peers(peers, kwargs))

# What conftest.py and pyproject.toml ask for.
_PYTEST = ["@pip//:beartype", "@pip//:hypothesis", "@pip//:jaxtyping", "@pip//:pytest"]

def py_test(name, deps = [], peers = [], size = "medium", **kwargs):
    """A test that runs its srcs with pytest.

    Args:
        name: the target's name.
        deps: what it imports, pytest aside.
        peers: targets of @peers. PIPPIN_PEERS_PYTHON names the interpreter that imports them.
        size: its time limit: small is two minutes, medium ten, large thirty (.bazelrc).
        **kwargs: see the rule.
    """
    _py_test(
        name = name,
        deps = deps + [d for d in _PYTEST if d not in deps],
        size = size,
        **_with_peers(peers, kwargs)
    )

def _pip_package_impl(ctx):
    return [
        DefaultInfo(runfiles = ctx.runfiles(files = [ctx.file.installed] + ctx.files.requires)),
        PythonInfo(imports = depset(), provided = depset([ctx.file.installed]), sources = depset()),
    ]

pip_package = rule(
    implementation = _pip_package_impl,
    doc = "A distribution in the environment of @pip.",
    attrs = {
        "installed": attr.label(allow_single_file = True, doc = "The files it installed, with their hashes."),
        "requires": attr.label_list(allow_files = True, doc = "The same of all that it requires."),
    },
)
