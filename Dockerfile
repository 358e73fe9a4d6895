# A frontend, a worker or any other command of `dynamo-redis`, as a user without rights.
#
#   docker build --tag dynamo-redis .
#   docker run --rm dynamo-redis --help
#
# Further extras, such as kserve or planes: --build-arg EXTRAS=http,engines,otel,kserve
#
# It has no HEALTHCHECK of its own, since only some of its commands have a port to ask: compose/single.yml
# shows the frontend's and the workers', and deploy/kubernetes the probes. It writes only below /tmp.
FROM python:3.12.11-slim-bookworm AS build
ARG EXTRAS=http,engines,otel

RUN python -m venv /opt/dynamo-redis
# What it depends on changes seldom, and stays a layer of its own: it is installed with an empty package.
COPY pyproject.toml README.md LICENSE /source/
RUN mkdir -p /source/src/dynamo_redis \
    && touch /source/src/dynamo_redis/__init__.py \
    && /opt/dynamo-redis/bin/pip install --no-cache-dir "/source[$EXTRAS]"
COPY src /source/src
RUN /opt/dynamo-redis/bin/pip install --no-cache-dir --no-deps --force-reinstall /source

FROM python:3.12.11-slim-bookworm

RUN groupadd --system --gid 10001 dynamo \
    && useradd --system --create-home --uid 10001 --gid 10001 --shell /usr/sbin/nologin dynamo
COPY --from=build /opt/dynamo-redis /opt/dynamo-redis
ENV PATH=/opt/dynamo-redis/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number: Kubernetes cannot tell from a name that it is not root.
USER 10001:10001
WORKDIR /home/dynamo
STOPSIGNAL SIGTERM
ENTRYPOINT ["dynamo-redis"]
CMD ["--help"]
