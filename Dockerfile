# Serves a finished run; docs/after-a-run.md says how. CPU: docker build -t hsft .
# CUDA: docker build -t hsft:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
FROM python:3.12-slim

# Index of the torch build: .../whl/cpu, or .../whl/cu130 for NVIDIA GPUs, whose driver the host has.
ARG TORCH=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/hsft
COPY pyproject.toml README.md LICENSE MANIFEST.in constraints.txt ./
COPY code ./code
# torch first, from its own index: the general one has the CUDA build alone. constraints.txt pins the rest.
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' constraints.txt)" \
    && pip install --index-url "$TORCH" "$torch" \
    && pip install -c constraints.txt '.[serve,index,parquet]'

RUN useradd --create-home --uid 1000 hsft
# By number, as Kubernetes wants it to know that it is not root.
USER 1000
# For other users too, whom --user names: caches go there.
ENV HOME=/home/hsft
# The folder in which the run was made, since paths in its configuration are relative to it.
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# HSFT_API_KEY must be set; arguments name the run, for example --run saved/Pixel200K-qlora.
ENTRYPOINT ["hsft", "serve", "--host", "0.0.0.0", "--port", "8000"]
