# A frontend, a worker or any other command of `dynamo-redis`, as a user without rights.
#
#   docker build --tag dynamo-redis .
#   docker run --rm dynamo-redis --help
#
# It has no HEALTHCHECK of its own, since only some of its commands have a port to ask: compose/single.yml
# shows the frontend's.
FROM python:3.12-slim AS build

COPY pyproject.toml README.md /source/
COPY src /source/src
RUN python -m venv /opt/dynamo-redis \
    && /opt/dynamo-redis/bin/pip install --no-cache-dir '/source[http,engines]'

FROM python:3.12-slim

RUN useradd --system --create-home --uid 10001 --shell /usr/sbin/nologin dynamo
COPY --from=build /opt/dynamo-redis /opt/dynamo-redis
ENV PATH=/opt/dynamo-redis/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER dynamo
WORKDIR /home/dynamo
STOPSIGNAL SIGTERM
ENTRYPOINT ["dynamo-redis"]
CMD ["--help"]
