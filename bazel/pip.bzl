"""Third-party Python packages, from a hash-locked requirements file.

pip_repository makes one virtual environment with every locked distribution
and one target for each: @pip//:jax, @pip//:orbax_checkpoint, ... Its
interpreter is venv/bin/python beside @pip//:python.txt.

Depending on such a target does not put the distribution on sys.path (the whole
environment always is): it makes a list of the hashes of the distribution's
files, and of those of what it requires, an input. A cached test result is
therefore dropped when a distribution that the test depends on changes, and
only then.
"""

_PROBE = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
_PYTHON_ENV = ["PIPPIN_PYTHON", "PIPPIN_PYTHON311"]

def _candidates(rctx):
    """Where to look: pairs of a place, in words, and the interpreters there."""
    version = rctx.attr.python_version
    env = rctx.os.environ
    named = env.get(rctx.attr.python_env)
    if named:
        return [(rctx.attr.python_env, [named])]

    # pyenv's shims are on PATH for every installed version, but only run for
    # the selected ones: look behind them.
    versions = rctx.path(env.get("PYENV_ROOT", env.get("HOME", "/") + "/.pyenv") + "/versions")
    pyenv = [
        versions.get_child(entry).get_child("bin").get_child("python3")
        for entry in (sorted([p.basename for p in versions.readdir()], reverse = True) if versions.exists else [])
        if entry.startswith(version + ".")
    ]
    on_path = [(name + " on PATH", [rctx.which(name)]) for name in ["python" + version, "python3", "python"]]
    return on_path[:1] + [("%s/%s.*" % (versions, version), pyenv)] + on_path[1:]

def _find_python(rctx):
    tried = []
    for place, candidates in _candidates(rctx):
        candidates = [c for c in candidates if c]
        if not candidates:
            tried.append("  %s: nothing there" % place)
        for candidate in candidates:
            result = rctx.execute([candidate, "-c", _PROBE])
            answer = "Python " + result.stdout.strip() if result.return_code == 0 else "not usable"
            if answer == "Python " + rctx.attr.python_version:
                return candidate
            tried.append("  %s, %s: %s" % (place, candidate, answer))
    fail("\n".join([
        "no Python %s with the venv module was found for @%s." % (rctx.attr.python_version, rctx.name),
        "Put python%s on PATH, install it with pyenv, or set %s to it." %
        (rctx.attr.python_version, rctx.attr.python_env),
        "Looked in:",
    ] + tried))

def _run(rctx, what, command):
    rctx.report_progress(what)
    result = rctx.execute(
        command,
        timeout = 3600,
        environment = {
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_REQUIRE_VIRTUALENV": "0",
            "PYTHONPATH": "",
        },
    )
    if result.return_code != 0:
        errors = [line for line in result.stderr.split("\n") if not line.startswith("WARNING")]
        fail("%s failed:\n%s%s" % (what, result.stdout[-4000:], "\n".join(errors)[-4000:]))
    return result.stdout

def _split(rctx, requirements):
    """Writes two requirements files: the wheels, and the distributions that have none."""
    files = {False: [], True: []}
    source = False
    for line in rctx.read(requirements).split("\n"):
        if line and line[0] not in " #":
            source = line.split("==")[0] in rctx.attr.sources
        files[source].append(line)
    rctx.file("wheels.txt", "\n".join(files[False]))
    rctx.file("sources.txt", "\n".join(files[True]))

def _pip_repository_impl(rctx):
    _split(rctx, rctx.path(rctx.attr.requirements))
    index = rctx.path(rctx.attr._index)
    python = "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--no-compile"]
    _run(rctx, "Creating a virtual environment", [_find_python(rctx), "-m", "venv", "--clear", "venv"])
    _run(rctx, "Installing the wheels", install + ["--only-binary=:all:", "-r", "wheels.txt"])

    # Built with the locked setuptools, not with one that pip would download.
    if rctx.attr.sources:
        _run(rctx, "Installing the sources", install + ["--no-build-isolation", "-r", "sources.txt"])

    # Not by pip, which uses one core. A sandbox could not write them later.
    # Some distributions hold files for other versions of Python, which fail.
    rctx.report_progress("Compiling the installed distributions")
    rctx.execute([python, "-m", "compileall", "-qq", "-j0", "venv/lib"], timeout = 3600)
    _run(rctx, "Checking the installed distributions", [python, "-m", "pip", "check"])
    _run(rctx, "Listing the installed distributions", [python, index])

pip_repository = repository_rule(
    implementation = _pip_repository_impl,
    doc = "A virtual environment with every distribution of a lock file, and a target for each.",
    attrs = {
        "python_version": attr.string(mandatory = True, doc = "Such as 3.12."),
        "python_env": attr.string(
            default = "PIPPIN_PYTHON",
            doc = "The environment variable that may name the interpreter.",
            values = _PYTHON_ENV,
        ),
        "requirements": attr.label(mandatory = True, allow_single_file = True, doc = "The lock file, with hashes."),
        "sources": attr.string_list(doc = "The locked distributions that exist only as source."),
        "_index": attr.label(default = "//bazel:pip_index.py"),
    },
    environ = _PYTHON_ENV + ["PYENV_ROOT"],
)
