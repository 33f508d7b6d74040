"""What the compiler for NVIDIA GPUs is told where there is none: the GPU's description, options, and a driver that fails.

XLA compiles by the description alone. cuDNN, which compiles attention, is told the same by XLA, but its libraries need
the functions of a GPU's driver: it has its kernels loaded, and never runs one. `_driver` has them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pippin.core.hardware.device import Device

_FIRST_CUDNN_THAT_ASKS_FOR_MORE = (
    9,
    25,
)  # than the XLA of JAX 0.12.0.1 tells it: the width of the memory's bus

# The functions of the driver that XLA or cuDNN look up. All say that there is no GPU, but those that load a kernel.
_LOADING = ("cuKernelGetAttribute", "cuKernelSetAttribute", "cuLibraryUnload")
_HANDLES = ("cuLibraryGetKernel", "cuLibraryLoadData")
_FAILING = (
    *("cuCtxGetCurrent", "cuCtxGetLimit", "cuCtxPopCurrent", "cuCtxPushCurrent", "cuDeviceGet"),
    *("cuDeviceGetCount", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuInit"),
    *("cuLaunchCooperativeKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cuLibraryLoadFromFile"),
    *("cuLinkAddData", "cuLinkComplete", "cuLinkCreate", "cuLinkDestroy", "cuModuleGetFunction"),
    *("cuModuleLoadData", "cuModuleUnload", "cuOccupancyMaxPotentialClusterSize", "cuStreamGetCtx"),
    *("cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled"),
)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def gpu_description(device: Device) -> str:
    """A kind of GPU as XLA's `GpuTargetConfigProto`, in text. What is not in `Device` is the same for all that are."""
    if device.gpu is None:
        raise ValueError(f"{device.kind} is no GPU.")
    gpu = device.gpu
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 24 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          name: "{gpu.name}"
          cuda_compute_capability {{ major: {gpu.compute_capability} feature_extension: ACCELERATED_FEATURES }}
          core_count: {gpu.cores}
          fpus_per_core: 128
          clock_rate_ghz: {gpu.clock_hz / 1e9}
          memory_bandwidth: {device.memory_bandwidth:.0f}
          device_memory_size: {device.memory_bytes:.0f}
          l2_cache_size: {gpu.cache_bytes}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          driver_version: "12.9.0"
          runtime_version: "12.9.0"
          compile_time_toolkit_version: "12.9.0"
          dnn_version: "9.24.0"
        }}
        """


def gpu_options(*, with_cudnn: bool) -> Mapping[str, Any]:
    """XLA's options without a GPU: nothing can be timed, and cuDNN has no device to ask."""
    mode = "ALWAYS" if with_cudnn else "DISABLED"
    return {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_cudnn_deviceless_compilation_mode": f"CUDNN_DEVICELESS_COMPILATION_{mode}",
    }


@functools.cache
def cudnn_left_out() -> str:
    """Why cuDNN does not compile its kernels here; empty where it does, once this was called."""
    version = importlib.metadata.version("nvidia-cudnn-cu12")
    if tuple(int(n) for n in version.split(".")[:2]) >= _FIRST_CUDNN_THAT_ASKS_FOR_MORE:
        return f"cuDNN {version} asks for more than this XLA knows of a GPU: pip install 'nvidia-cudnn-cu12<9.25'"
    compiler = shutil.which("cc")
    if compiler is None:
        return "cuDNN needs a driver's functions, and there is no C compiler (cc) to make some"
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "libcuda.so.1"
        # The name that cuDNN's libraries ask for: the loader takes what is loaded by this name, here or not.
        name = f"-Wl,-soname,{library.name}"
        command = [compiler, "-shared", "-fPIC", "-w", name, "-x", "c", "-", "-o", str(library)]
        done = subprocess.run(command, input=_driver(), capture_output=True, text=True, check=False)
        if done.returncode:
            return f"cuDNN needs a driver's functions, and cc made none: {done.stderr.strip()[:200]}"
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return ""


def _driver() -> str:
    """The source, in C, of a driver without a GPU."""
    return "\n".join(
        [
            "static int kernel;",
            *(f"int {name}() {{ return 0; }}" for name in _LOADING),
            *(f"int {name}(void **handle) {{ *handle = &kernel; return 0; }}" for name in _HANDLES),
            *(f"int {name}() {{ return {_NO_DEVICE}; }}" for name in _FAILING),
        ]
    )
