# syntax=docker/dockerfile:1
# hadolint global ignore=DL3008
#
#   docker build -t manylora .                        for CPUs
#   docker build -t manylora:cuda --target cuda .     for NVIDIA GPUs, with flash-attn built from source
#
#   docker run -p 8000:8000 -v manylora:/var/lib/manylora manylora serve --max-loras 32
#
# All state is in the volume; adapters go to adapters/ there. Options may also be given as MANYLORA_… variables.

# flash-attn is built with Ubuntu 24.04's Python, so another version here needs another image there.
ARG PYTHON_VERSION=3.12
# The toolkit and torch's own CUDA must be of one major version.
ARG CUDA_VERSION=13.0.1
ARG TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu


FROM python:${PYTHON_VERSION}-slim AS runtime
# bitsandbytes' CPU kernels use OpenMP.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/manylora manylora
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


FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS flash-attn
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


FROM build AS build-cuda
ARG TORCH_CUDA_INDEX
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_CUDA_INDEX}" torch
COPY . .
RUN --mount=type=bind,from=flash-attn,source=/wheels,target=/wheels \
    pip install --constraint constraints.txt --find-links /wheels ".[flash-attn]"


FROM build AS build-cpu
ARG TORCH_CPU_INDEX
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_CPU_INDEX}" torch
COPY . .
RUN pip install --constraint constraints.txt .


# torch's wheels bring CUDA's libraries and the container toolkit brings the driver.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 0
# Triton compiles the launchers of its kernels when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001
COPY --from=build-cuda /opt/manylora /opt/manylora


# The last stage is what `docker build` makes without --target.
FROM runtime AS cpu
COPY --from=build-cpu /opt/manylora /opt/manylora
