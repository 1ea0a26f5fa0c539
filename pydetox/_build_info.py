"""What is installed, built and in use: the text to paste into a bug report."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from pydetox.errors import NativeLibraryError


def build_info() -> dict[str, Any]:
    """Describe this installation; every value can be written as JSON.

    Returns:
        A dict with the keys

        - `pydetox`, `python`, `torch`, `platform`: versions and the system
        - `native_library`: folder of the loaded native libraries, or why they could not be loaded;
            in that case the keys that only they know are None
        - `compiler`, `built_with_torch`: how the native libraries were built
        - `cpu_capability`, `cpu_capabilities`: the instruction set in use and those this CPU can
            run; `cpu_capability_forced`: the value of `PYDETOX_CPU_CAPABILITY`, or None
        - `threads`, `parallel_backend`: torch's
        - `cuda_built`, `cuda_architectures`, `cuda_toolkit`: the CUDA kernels of pydetox
        - `cuda_loaded`: whether they are registered with torch (this needs no GPU)
        - `fast_towers`: the image towers that inversion runs without their own module
        - `torch_cuda`: CUDA version that torch was built with, or None
        - `gpus`: names of the GPUs that torch sees
    """
    backend = re.search(r"ATen parallel backend: (.*)", torch.__config__.parallel_info())
    info: dict[str, Any] = {
        "pydetox": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "native_library": None,
        "compiler": None,
        "built_with_torch": None,
        "cpu_capability": None,
        "cpu_capabilities": None,
        "cpu_capability_forced": os.environ.get("PYDETOX_CPU_CAPABILITY") or None,
        "threads": torch.get_num_threads(),
        "parallel_backend": backend[1].strip() if backend else None,
        "cuda_built": None,
        "cuda_architectures": None,
        "cuda_toolkit": None,
        "cuda_loaded": None,
        "fast_towers": "open_clip's vision transformers; others run through their own module",
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    try:
        from pydetox.ops import _library
    except NativeLibraryError as error:
        info["native_library"] = f"not loaded: {error}"
        return info
    built = _library.native.compile_info()
    info.update(
        {
            "pydetox": built["version"],
            "native_library": str(Path(_library.PACKAGE_DIR)),
            "compiler": f"{built['compiler']} ({built['build_type']})",
            "built_with_torch": built["torch_built_with"],
            "cpu_capability": _library.cpu_capability(),
            "cpu_capabilities": _library.native.supported_cpu_capabilities(),
            "cuda_built": built["cuda"],
            "cuda_architectures": built["cuda_architectures"].split() if built["cuda"] else None,
            "cuda_toolkit": built["cuda_toolkit"] or None,
            "cuda_loaded": _library.cuda_library_loaded(),
        }
    )
    return info
