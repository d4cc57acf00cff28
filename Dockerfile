# syntax=docker/dockerfile:1
# Build: docker build -t evospec .          (CPU)
# For GPUs this image is no base: Triton and flashinfer compile at run time, with a C compiler and the CUDA toolkit.
# Run:   docker run -p 8000:8000 -e EVOSPEC_AUTH__KEYS=TENANT=HASH -v evospec-models:/var/lib/evospec evospec

FROM python:3.11-slim AS builder
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/evospec
ENV PATH=/opt/evospec/bin:$PATH
# torch first, in a layer of its own: it is most of the image and changes least.
RUN if [ -n "$TORCH_INDEX_URL" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch; fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY adapters adapters
COPY drafts drafts
# Without a compiler the build of the kernels only warns, and the server would fall back to plain torch: not in an image.
# Whether they are installed, the sources' hash in them says: pip gives each file the time of its unpacking.
RUN python -m kernels.build --all && ls kernels/_native_avx2.so kernels/_native_avx512.so \
    && pip install --no-cache-dir . && cd / \
    && python -c "from kernels.targets import TARGETS; assert all(target.is_of_these_sources for target in TARGETS)"

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/evospec --create-home evospec
COPY --from=builder /opt/evospec /opt/evospec
ENV PATH=/opt/evospec/bin:$PATH \
    EVOSPEC_HTTP__HOST=0.0.0.0 \
    EVOSPEC_ENGINE__MODEL__CACHE_DIR=/var/lib/evospec
USER 10001
WORKDIR /var/lib/evospec
VOLUME /var/lib/evospec
EXPOSE 8000
# The first start fetches the model.
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["evospec"]
CMD ["serve"]
