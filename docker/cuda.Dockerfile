# The package with vLLM for GPU hosts and clusters. Build it in the checkout:
#   docker build -f docker/cuda.Dockerfile -t opencharacter:cuda .
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
WORKDIR /source
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3.12-venv && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
COPY requirements/gpu.txt requirements/
RUN /opt/venv/bin/pip install --no-cache-dir --quiet --no-deps --require-hashes -r requirements/gpu.txt
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --quiet --no-deps .

# vLLM compiles kernels when an engine starts, which needs nvcc and a C compiler.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libnuma1 python3.12 python3.12-dev wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 opencharacter \
 && install -d -o opencharacter /runs /cache
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    OPENCHARACTER_CACHE=/cache \
    RAY_AUTH_MODE=token \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /runs
VOLUME ["/runs", "/cache"]
EXPOSE 6379 8000 8265
# For `serve`; start other commands with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=900s --retries=5 \
  CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["opencharacter"]
CMD ["--help"]
