# syntax=docker/dockerfile:1
# Build: make image, with docker, podman or buildah. docs/deploying.md says how it is run.
# For GPUs this image is no base: Triton and flashinfer compile at run time, with a C compiler and the CUDA toolkit.

# With Python 3.11 or newer, its venv module, and apt.
ARG BASE=python:3.11-slim

# What EvoSpec depends on is a layer of its own: nearly all of the image, and changes least.
FROM ${BASE} AS dependencies
# Empty: the torch of pip's usual index, which on Linux brings several gigabytes of CUDA.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/evospec
ENV PATH=/opt/evospec/bin:$PATH
COPY pyproject.toml /tmp/
# What only a compiler or a GPU uses goes: torch's headers, and Triton, a gigabyte, which xgrammar brings for GPUs.
RUN if [ -n "$TORCH_INDEX_URL" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch; fi \
    && python -c "import tomllib; project = tomllib.load(open('/tmp/pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['tracing'], sep='\n')" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && pip uninstall --yes triton \
    && cd /opt/evospec/lib/python3.*/site-packages && rm -rf torch/include torch/bin/protoc* \
    && find . -type d -name tests -prune -exec rm -rf {} +

FROM dependencies AS builder
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY adapters adapters
COPY drafts drafts
COPY evospec evospec
RUN python -m evospec.kernels.build --all && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
# Process 1: it takes signals from the first moment on, and ends what nobody else waits for.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
RUN useradd --system --uid 10001 --home-dir /var/lib/evospec --create-home evospec
COPY --from=dependencies /opt/evospec /opt/evospec
ENV PATH=/opt/evospec/bin:$PATH \
    HOME=/var/lib/evospec \
    EVOSPEC_HTTP__HOST=0.0.0.0 \
    EVOSPEC_ENGINE__MODEL__CACHE_DIR=/var/lib/evospec
# Without a compiler the build of the kernels only warns, and the server would fall back to plain torch: not in an image.
# Whether they are installed, the sources' hash in them says: pip gives each file the time of its unpacking.
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl \
    && python -c "from evospec.kernels.targets import PLAIN, TARGETS; assert all(target.is_of_these_sources for target in (*TARGETS, PLAIN))"
USER 10001
WORKDIR /var/lib/evospec
VOLUME /var/lib/evospec
EXPOSE 8000
# The first start fetches the model.
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "evospec"]
CMD ["serve"]
