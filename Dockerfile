# The server with the default model in it. Other models are mounted: -v ./LLM/<vendor>:/app/LLM/<vendor>:ro
#   docker build -t wsserver .
#   export WSSERVER_API_KEY=sk-$(openssl rand -hex 32)
#   docker run --rm -p 127.0.0.1:41443:41443 -e WSSERVER_API_KEY wsserver     (with --gpus all on a machine with a GPU)
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /app

# What changes rarely first: the packages take minutes and gigabytes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY wsserver/__init__.py wsserver/
COPY wsserver/client/__init__.py wsserver/client/
COPY wsserver_mqtt/__init__.py wsserver_mqtt/
COPY handlers/__init__.py handlers/
COPY LLM/__init__.py LLM/
COPY LLM/download/__init__.py LLM/download/
COPY LLM/engine/__init__.py LLM/engine/
RUN pip install --constraint constraints.txt --editable ".[mqtt]"

COPY LLM LLM
RUN python -m LLM.default_model
COPY wsserver wsserver
COPY wsserver_mqtt wsserver_mqtt
COPY handlers handlers

RUN useradd --system wsserver
USER wsserver

EXPOSE 41443
# Inside a container the loopback address reaches nobody. On any other the server wants a key, or to be told that it needs none.
ENV WSSERVER_HOST=0.0.0.0
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:41443/healthz', timeout=2)"]
# SIGTERM drains. docker stop kills after 10 seconds: a short drain leaves time to say goodbye; longer ones need --stop-timeout.
CMD ["wsserver", "--drain-timeout", "4"]
