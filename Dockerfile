# The server: docker build -t beit3-serve . && docker run -p 8000:8000 beit3-serve
#
# For GPUs build it with --build-arg TORCH_INDEX= (the usual index has torch with CUDA), and run it
# with --gpus all before its name and --device cuda after it.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/beit3
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[serve]" && useradd --uid 10001 --create-home beit3

USER beit3
WORKDIR /home/beit3
ENV BEIT3_CACHE=/tmp/beit3
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
# Arguments of `docker run` take the place of CMD alone: the server stays reachable from outside.
ENTRYPOINT ["beit3", "serve", "--host", "0.0.0.0"]
CMD ["--port", "8000"]
