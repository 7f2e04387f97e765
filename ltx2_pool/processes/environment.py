"""What a child inherits of the worker's environment, and what the worker denies itself before it starts any.

Children run the model and nothing else: they get what Python, torch, compilers and the device need, and no credentials.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping

_SYSTEM = "HOME LANG LANGUAGE LOGNAME PATH TEMP TMP TMPDIR TZ USER VIRTUAL_ENV XDG_CACHE_HOME"
_COMPILERS = """
    AR AS CC CFLAGS COMPILER_PATH CPATH CPLUS_INCLUDE_PATH CPPFLAGS CXX CXXFLAGS C_INCLUDE_PATH GCC_EXEC_PREFIX LD
    LDFLAGS LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH
"""
_LIBRARIES = "ATEN_CPU_CAPABILITY HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TOKENIZERS_PARALLELISM TRANSFORMERS_OFFLINE"
_LIBRARIES_OWN = """
    CUBLAS CUDA_ CUDNN_ NCCL_ NVCC NVIDIA_
    AOT_ FASTVIDEO_ INDUCTOR_ PYTORCH_ TORCH TRITON_
    DNNL_ GOMP_ KMP_ MALLOC_ MKL_ OMP_ ONEDNN_ OPENBLAS_
"""
_TESTS_OWN = "COVERAGE_ COV_CORE_ LTX2_IMAGINARY"
"""Of their coverage, and of the engine that they make up."""
_NAMES = frozenset(f"{_SYSTEM} {_COMPILERS} {_LIBRARIES}".split())
_PREFIXES = tuple(f"LC_ PYTHON {_LIBRARIES_OWN} {_TESTS_OWN}".split())
_SECRET = re.compile(r"(^|_)(API|AUTH|CREDENTIALS?|KEY|PASS|PASSWD|PASSWORD|SECRET|TOKENS?)(_|$)")
"""Words in a name that announce a secret, whatever the name begins with: NVIDIA_API_KEY."""


_DESCRIPTORS = 65536


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a child gets."""
    return {
        name: value
        for name, value in environ.items()
        if name in _NAMES or (name.startswith(_PREFIXES) and not _SECRET.search(name.upper()))
    }


def harden() -> None:
    """For the worker, before it makes its first file: nobody else can read its files, and no core dump shows a prompt.

    And it may open as many descriptors as the system lets it: each request takes one, and each process several.
    Children inherit all of it, and set the first two themselves as well.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
