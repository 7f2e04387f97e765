# syntax=docker/dockerfile:1
# runtime: everything but the compile caches. The default target adds the caches that warmup.py baked into ./baked on a
# host with the same GPU (RUNBOOK.md, "Build an image"). Pin the base by digest: --build-arg BASE=python:3.12-slim@sha256:...
ARG BASE=python:3.12.12-slim-bookworm
FROM ${BASE} AS runtime
# Triton and inductor compile their launchers with a C compiler at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ltx2-pool
COPY requirements.lock pyproject.toml README.md ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --no-deps -r requirements.lock
COPY ltx2_pool ltx2_pool
COPY worker.py warmup.py shapes.yaml ./
RUN uv pip install --system --no-cache --no-deps --no-build-isolation . \
    && useradd --uid 10001 --create-home ltx2 \
    && install --directory --owner ltx2 /cache
ENV LTX2_MODEL=/model LTX2_CACHE_ROOT=/cache LTX2_POOL_MODE=1 DYN_SYSTEM_PORT=9090 PYTHONUNBUFFERED=1
USER ltx2
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/health', timeout=5)"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "worker.py"]

FROM runtime AS baked
ARG IMAGE_SHAPE_HASH
COPY --chown=ltx2 baked/ /cache/
# Fails the build when the caches were baked for another menu than the one in the image.
RUN python -c "from pathlib import Path; from ltx2_pool.shapes import Menu; Menu.load(Path('shapes.yaml')).check_image('${IMAGE_SHAPE_HASH:?give --build-arg IMAGE_SHAPE_HASH}')"
ENV IMAGE_SHAPE_HASH=${IMAGE_SHAPE_HASH} LTX2_CACHE_POLICY=strict
