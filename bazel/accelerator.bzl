"""The plugin with which JAX uses the accelerator of this machine."""

# What JAX itself looks for: a device of Google's with one of these ids is a TPU.
_TPU_IDS = ["0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x007c", "0x0083"]

_FIND_TPU = """
for device in /sys/bus/pci/devices/*; do
  if [ "$(cat "$device/vendor")" = 0x1ae0 ]; then cat "$device/device"; fi
done
"""

_OVERLAYS = {"cpu": "", "cuda": "@cuda//:overlay", "tpu": "@libtpu//:overlay"}

def _detect(rctx):
    if rctx.path("/dev/nvidiactl").exists or rctx.path("/dev/dxg").exists:
        return "cuda"
    ids = rctx.execute(["sh", "-c", _FIND_TPU]).stdout.split("\n")
    return "tpu" if [i for i in ids if i in _TPU_IDS] else "cpu"

def _accelerator_repository_impl(rctx):
    named = rctx.os.environ.get("PIPPIN_ACCELERATOR")
    if named and named not in _OVERLAYS:
        fail("PIPPIN_ACCELERATOR is %r. Set it to one of %s, or unset it to use what the machine has." %
             (named, ", ".join(_OVERLAYS)))
    overlay = _OVERLAYS[named or _detect(rctx)]
    rctx.file("BUILD", "\n".join([
        "filegroup(",
        "    name = \"overlay\",",
        "    srcs = [%s]," % ("\"%s\"" % overlay if overlay else ""),
        "    visibility = [\"//visibility:public\"],",
        ")",
        "",
    ]))

accelerator_repository = repository_rule(
    implementation = _accelerator_repository_impl,
    doc = "@accelerator//:overlay: @cuda's or @libtpu's by the hardware of this machine or PIPPIN_ACCELERATOR, or nothing.",
    environ = ["PIPPIN_ACCELERATOR"],
    local = True,  # looks again after each start of Bazel's server
)
