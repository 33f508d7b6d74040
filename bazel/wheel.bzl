"""py_wheel: a package's wheel."""

load("//bazel:python.bzl", "PythonInfo")

def _py_wheel_impl(ctx):
    root = ctx.label.package + "/"
    packaged = depset(transitive = [
        depset(transitive = [d[PythonInfo].sources, d[DefaultInfo].default_runfiles.files])
        for d in ctx.attr.deps
    ])
    inputs = [ctx.file.pyproject] + ctx.files.data + [
        f
        for f in packaged.to_list()
        if f.short_path.startswith(root + "pippin/")
    ]
    out = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add(out.path)
    for f in inputs:
        arguments.add(f.short_path[len(root):])
        arguments.add(f)
    ctx.actions.run(
        executable = ctx.executable._builder,
        arguments = [arguments],
        inputs = inputs,
        outputs = [out],
        mnemonic = "PyWheel",
        progress_message = "Building the wheel %s" % ctx.label,
    )
    return [DefaultInfo(files = depset([out]), runfiles = ctx.runfiles(files = [out]))]

_py_wheel = rule(
    implementation = _py_wheel_impl,
    doc = "A folder with one wheel: the files of deps, data included, that lie under its folder pippin, built by pyproject.toml.",
    attrs = {
        "data": attr.label_list(allow_files = True, doc = "Files beside pyproject.toml, such as README.md."),
        "deps": attr.label_list(providers = [PythonInfo], mandatory = True),
        "pyproject": attr.label(mandatory = True, allow_single_file = True),
        "_builder": attr.label(default = "//bazel:build_wheel", executable = True, cfg = "exec"),
    },
)

def py_wheel(name, pyproject = "pyproject.toml", **kwargs):
    """The wheel of a package that has a pyproject.toml.

    Args:
        name: the target's name, and that of the folder with the wheel.
        pyproject: the package's pyproject.toml.
        **kwargs: see the rule.
    """
    _py_wheel(name = name, pyproject = pyproject, **kwargs)
