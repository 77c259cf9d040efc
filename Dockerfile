# Two images:
#   docker build -t nemo_kto .                      nemo_kto on top of an NVIDIA image, whose torch, Megatron-Core,
#                                                   Transformer Engine and Apex stay as they are
#   docker build -t nemo_kto:cpu --target cpu .     the exact CPU set of requirements/cpu.txt on a plain Python
# docs/launch.md says how to run them, and which base images fit.

# The newest NeMo image with a Megatron-Core inside the bounds of pyproject.toml (0.16.0; that of 26.04 is 0.17.0).
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:26.02
ARG CPU_BASE_IMAGE=python:3.11-slim

FROM ${CPU_BASE_IMAGE} AS cpu
# For builds only: installing as root into the system's Python is what an image is for.
ARG PIP_BREAK_SYSTEM_PACKAGES=1
ARG PIP_ROOT_USER_ACTION=ignore
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_CACHE_DIR=/var/.cache/pip
WORKDIR /opt/nemo_kto
COPY requirements/cpu.txt requirements/
# As in the Makefile: torch from the indexes that pip is set up with (offline mirrors have it), or from PyTorch's own.
RUN --mount=type=cache,target=/var/.cache/pip \
    torch="$(sed -n 's/^torch==//p' requirements/cpu.txt)" \
    && { python3 -m pip install --no-deps "torch==${torch}+cpu" || python3 -m pip install --no-deps \
         --index-url https://download.pytorch.org/whl/cpu "torch==${torch}"; } \
    && python3 -m pip install --requirement requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY nemo_kto nemo_kto
RUN --mount=type=cache,target=/var/.cache/pip \
    python3 -m pip install --no-deps --no-build-isolation .
COPY examples examples
# Any user may run it: what is there can be read, and home, caches and the working directory can be written.
RUN chmod -R a+rX /opt/nemo_kto && install -d -m 1777 /home/kto /workspace
# A user without an entry in /etc/passwd has a name and a home. Nothing is imported from ~/.local: a mounted home's
# packages would shadow the image's.
ENV HOME=/home/kto USER=kto LOGNAME=kto PYTHONNOUSERSITE=1
WORKDIR /workspace
ARG SOURCE=unknown
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_kto (CPU)" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
CMD ["nemo-kto", "doctor"]

FROM ${BASE_IMAGE} AS gpu
ARG PIP_BREAK_SYSTEM_PACKAGES=1
ARG PIP_ROOT_USER_ACTION=ignore
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_CACHE_DIR=/var/.cache/pip
# More for the image, as for pip: --build-arg EXTRA_PACKAGES="wandb flask>=3"
ARG EXTRA_PACKAGES=""
WORKDIR /opt/nemo_kto
COPY docker/held_packages.py docker/
COPY pyproject.toml ./
# PIP_CONSTRAINT: NVIDIA's images set it, to what their own build began with. What is in the image now takes its place.
RUN --mount=type=cache,target=/var/.cache/pip \
    python3 docker/held_packages.py record pyproject.toml /opt/nemo_kto/held --extra demo --also "${EXTRA_PACKAGES}" \
    && PIP_CONSTRAINT='' python3 -m pip install --constraint held/constraints.txt --requirement held/requirements.txt \
    && python3 docker/held_packages.py check /opt/nemo_kto/held
COPY README.md LICENSE ./
COPY conf conf
COPY nemo_kto nemo_kto
RUN --mount=type=cache,target=/var/.cache/pip \
    PIP_CONSTRAINT='' python3 -m pip install --no-deps . && python3 docker/held_packages.py check held
COPY examples examples
RUN chmod -R a+rX /opt/nemo_kto && install -d -m 1777 /home/kto /workspace
ENV HOME=/home/kto USER=kto LOGNAME=kto PYTHONNOUSERSITE=1
WORKDIR /workspace
ARG BASE_IMAGE
ARG SOURCE=unknown
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_kto" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
CMD ["nemo-kto", "doctor"]
