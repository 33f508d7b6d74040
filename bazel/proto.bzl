"""py_proto_library: Python modules from .proto files."""

load("//bazel:python.bzl", "PythonInfo", "python_info")

ProtoFilesInfo = provider(
    doc = "What a .proto file that imports others needs.",
    fields = {
        "files": "depset of .proto files",
        "roots": "depset of protoc's -I folders",
    },
)

def _py_proto_library_impl(ctx):
    root = ctx.label.package
    suffixes = ["_pb2.py", "_pb2.pyi"] + (["_pb2_grpc.py"] if ctx.attr.grpc else [])
    outputs = [
        ctx.actions.declare_file(src.short_path[len(root) + 1:-len(".proto")] + suffix)
        for src in ctx.files.srcs
        for suffix in suffixes
    ]
    protos = ProtoFilesInfo(
        files = depset(ctx.files.srcs, transitive = [d[ProtoFilesInfo].files for d in ctx.attr.deps]),
        roots = depset([root], transitive = [d[ProtoFilesInfo].roots for d in ctx.attr.deps]),
    )
    out = ctx.bin_dir.path + "/" + root
    arguments = ctx.actions.args()
    arguments.add_all(protos.roots, format_each = "-I%s")
    arguments.add("--python_out=" + out)
    arguments.add("--pyi_out=" + out)
    if ctx.attr.grpc:
        arguments.add("--grpc_python_out=" + out)
    arguments.add_all(ctx.files.srcs)
    ctx.actions.run(
        executable = ctx.executable._protoc,
        arguments = [arguments],
        inputs = protos.files,
        outputs = outputs,
        mnemonic = "PyProtoc",
        progress_message = "Generating Python from %s" % ctx.label,
    )
    deps = ctx.attr.deps + ctx.attr._runtime
    runfiles = ctx.runfiles(files = outputs)
    for dep in deps:
        runfiles = runfiles.merge(dep[DefaultInfo].default_runfiles)
    return [
        DefaultInfo(files = depset(outputs), runfiles = runfiles),
        protos,
        python_info(ctx, outputs, ["."], deps),
    ]

py_proto_library = rule(
    implementation = _py_proto_library_impl,
    doc = "Import paths, in .proto files and in Python, start at the target's package.",
    attrs = {
        "deps": attr.label_list(providers = [ProtoFilesInfo, PythonInfo]),
        "grpc": attr.bool(doc = "Generate services too."),
        "srcs": attr.label_list(allow_files = [".proto"]),
        "_protoc": attr.label(default = "//bazel:protoc", executable = True, cfg = "exec"),
        "_runtime": attr.label_list(default = ["@pip//:protobuf"]),
    },
)
