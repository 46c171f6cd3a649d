# Two images from one file: `--target cpu` (default) and `--target cuda`. Both run the API and the worker.
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1
RUN useradd --uid 10001 --create-home unpoison && mkdir /data && chown unpoison /data
WORKDIR /app

FROM base AS packages
COPY constraints.txt ./
# The pinned torch is the CUDA build; on a machine without a GPU it runs on the CPU.
RUN python -m venv /venv && /venv/bin/pip install --require-hashes -r constraints.txt

FROM base AS cpu
COPY --from=packages /venv /venv
COPY . .
RUN /venv/bin/pip install --no-deps --no-build-isolation -e .
ENV PATH=/venv/bin:$PATH UNPOISON_DATA_FOLDER=/data UNPOISON_HOST=0.0.0.0 UNPOISON_PORT=8642 UNPOISON_SANDBOX=required
USER unpoison
VOLUME /data
EXPOSE 8642
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8642/readyz', timeout=4)"]
CMD ["python", "-m", "service", "api"]

FROM cpu AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
