# syntax=docker/dockerfile:1
# hadolint global ignore=DL3008
#
#   docker build -t manylora .                        for CPUs
#   docker build -t manylora:cuda --target cuda .     for NVIDIA GPUs
#
#   docker run -p 8000:8000 -v manylora:/var/lib/manylora manylora serve --max-loras 32
#   docker run --gpus all -p 8000:8000 -v manylora:/var/lib/manylora manylora:cuda serve --base ORG/MODEL
#
# All state is in the volume; adapters go to adapters/ there. Options may also be given as MANYLORA_… variables.
# Keys are never built in: give them as variables when a container starts.

ARG PYTHON_VERSION=3.12
# The index decides which CUDA torch brings: an older driver needs an older one (cu126, say).
ARG TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# "with" compiles the flash-attn package, which takes long; without it torch's own FlashAttention-2 is used.
ARG FLASH_ATTN=without
# Only to compile flash-attn: the toolkit, of the major version of torch's own CUDA.
ARG CUDA_VERSION=13.0.1


FROM python:${PYTHON_VERSION}-slim AS runtime
# bitsandbytes' CPU kernels use OpenMP.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/manylora manylora \
    && install --directory --owner=manylora --group=manylora /var/lib/manylora/adapters
ENV PATH=/opt/manylora/bin:$PATH \
    HOME=/var/lib/manylora \
    MANYLORA_HOME=/var/lib/manylora \
    MANYLORA_HOST=0.0.0.0 \
    MANYLORA_PORT=8000
# By number, so that Kubernetes can tell that it is not root.
USER 10001
WORKDIR /var/lib/manylora
VOLUME /var/lib/manylora
EXPOSE 8000
# A first start fetches and quantises the base before it answers.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['MANYLORA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["manylora"]
CMD ["serve"]


FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/manylora/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/manylora
WORKDIR /src
COPY constraints.txt ./


FROM scratch AS flash-attn-without
WORKDIR /wheels


# It is compiled for Ubuntu 24.04's Python, so another PYTHON_VERSION needs another image here.
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS flash-attn-with
ARG TORCH_CUDA_INDEX
# The compute capabilities to build for, and how many compilers run at once (each takes some 4 GB).
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/build/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/build
WORKDIR /src
COPY constraints.txt ./
# It is compiled against the torch that is there, hence torch first and no build isolation.
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_CUDA_INDEX}" \
        torch ninja packaging psutil setuptools wheel \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels "flash-attn>=2.8,<3"


# hadolint ignore=DL3006
FROM flash-attn-${FLASH_ATTN} AS flash-attn


FROM build AS build-cuda
ARG TORCH_CUDA_INDEX
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_CUDA_INDEX}" torch
COPY . .
RUN --mount=type=bind,from=flash-attn,source=/wheels,target=/wheels \
    pip install --constraint constraints.txt . \
    && find /wheels -name "*.whl" -exec pip install --constraint constraints.txt {} +


FROM build AS build-cpu
ARG TORCH_CPU_INDEX
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_CPU_INDEX}" torch
COPY . .
RUN pip install --constraint constraints.txt .


# No CUDA image: torch's wheels bring CUDA's libraries, and the container toolkit brings the driver.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 0
# Triton needs a C compiler, libc's headers and Python's (which are in the image) when the server first starts:
# it compiles the module that loads its kernels, and keeps it in .triton in the volume.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001
COPY --from=build-cuda /opt/manylora /opt/manylora


# The last stage is what `docker build` makes without --target.
FROM runtime AS cpu
COPY --from=build-cpu /opt/manylora /opt/manylora
