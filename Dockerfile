# syntax=docker/dockerfile:1
# runtime: everything but the compile caches. The default target adds the caches that deploy/bake-image.sh baked into
# ./baked on a host with the GPU that will serve (RUNBOOK.md, "Build an image"). Pin both bases by digest:
#   --build-arg CUDA_DEVEL=nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:... --build-arg CUDA_BASE=...
# They are CUDA 13.0 because torch is built with it (torch.version.cuda).
ARG CUDA_DEVEL=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CUDA_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${CUDA_DEVEL} AS build
# No versions: Ubuntu keeps only the newest of each package, so a pinned one fails the build; the base's digest is the pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Bytecode is compiled here: whom the worker runs as cannot write it, and without it each import of FastVideo takes twice as long.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/usr/local/cuda/bin:${PATH} UV_COMPILE_BYTECODE=1
WORKDIR /build
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir uv==0.13.9
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps -r requirements.lock
# FastVideo's own kernels, for the GPUs that will serve ("10.0a" for a B200). Only attention backends beyond TORCH_SDPA, the
# default, and FLASH_ATTN use them; FASTVIDEO_KERNELS=0 leaves them out. The source distribution has neither CUTLASS, which
# comes from its own package, nor ThunderKittens: kernels that need the latter fall back to Triton.
ARG FASTVIDEO_KERNELS=1
ARG TORCH_CUDA_ARCH_LIST="9.0a"
ARG MAX_JOBS=4
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "${FASTVIDEO_KERNELS}" = 1 ]; then \
        uv pip install --no-deps scikit-build-core==1.1.2 cmake==4.4.4 ninja==1.13.2 \
            pathspec==1.1.1 nvidia-cutlass==4.2.0.0 \
        && CPATH="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cutlass_library/source/include:${CPATH:-}" \
            CMAKE_ARGS="-DFASTVIDEO_KERNEL_BUILD_TK=OFF" CMAKE_BUILD_PARALLEL_LEVEL="${MAX_JOBS}" \
            TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
            uv pip install --no-deps --no-build-isolation --no-binary fastvideo-kernel fastvideo-kernel==0.3.5 \
        && uv pip uninstall scikit-build-core cmake ninja pathspec nvidia-cutlass; \
    fi
COPY pyproject.toml README.md ./
COPY ltx2_pool ltx2_pool
RUN uv pip install --no-deps --no-build-isolation .
# What is in here, with versions, dependencies and licences (CycloneDX); the program that writes it stays behind.
RUN python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/venv/sbom.cdx.json /opt/venv/bin/python

FROM ${CUDA_BASE} AS runtime
# Triton and inductor compile their launchers at run time: that needs a C++ compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev tini \
    && rm -rf /var/lib/apt/lists/*
# /discovery: for DYN_FILE_KV on a volume that worker and frontend share; /state: for the gateway's jobs and videos.
RUN useradd --uid 10001 --create-home ltx2 \
    && install --directory --owner ltx2 --group ltx2 /cache /discovery /state
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/ltx2-pool
COPY shapes.yaml deploy/entrypoint.sh ./
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:${PATH} PYTHONUNBUFFERED=1 \
    LTX2_MODEL=/model LTX2_CACHE_ROOT=/cache LTX2_POOL_MODE=1 DYN_SYSTEM_PORT=9090
USER 10001:10001
EXPOSE 8000 8080 9090
HEALTHCHECK --interval=10s --timeout=6s --start-period=20m \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"DYN_SYSTEM_PORT\"]}/health', timeout=5)"]
ENTRYPOINT ["tini", "--", "/opt/ltx2-pool/entrypoint.sh"]
CMD ["ltx2-worker"]

FROM runtime AS baked
ARG IMAGE_SHAPE_HASH
ENV IMAGE_SHAPE_HASH=${IMAGE_SHAPE_HASH} LTX2_CACHE_POLICY=strict
COPY --chown=10001:10001 baked/ /cache/
# Fails the build when the caches were baked for another menu than the one in the image. The hash is data for the program.
RUN test -n "${IMAGE_SHAPE_HASH}" || { echo "give --build-arg IMAGE_SHAPE_HASH" >&2; exit 1; }; \
    python -c 'import os; from pathlib import Path; from ltx2_pool.words.menu import Menu; Menu.load(Path("shapes.yaml")).check_image(os.environ["IMAGE_SHAPE_HASH"])'
