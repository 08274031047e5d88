# The package with vLLM's CPU build, on which the demo runs. Build it in the checkout:
#   docker build -f docker/cpu.Dockerfile -t opencharacter:cpu .
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /source
# The user of the image cannot write bytecode beside the modules; without it, each process compiles them for half a minute.
ENV UV_COMPILE_BYTECODE=1
RUN python -m venv /opt/venv
COPY requirements/cpu.txt requirements/
# uv finds the CPU build of torch; the lock is complete, so nothing else is resolved.
RUN /opt/venv/bin/pip install --no-cache-dir --quiet "$(grep '^uv==' requirements/cpu.txt)" \
 && /opt/venv/bin/uv pip install --no-cache --quiet --python /opt/venv/bin/python --no-deps --torch-backend=cpu \
      -r requirements/cpu.txt
COPY . .
RUN /opt/venv/bin/uv pip install --no-cache --quiet --python /opt/venv/bin/python --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
# vLLM loads libnuma; KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 wget \
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
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=5 \
  CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["opencharacter"]
CMD ["--help"]
