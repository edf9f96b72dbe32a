# syntax=docker/dockerfile:1

# The image of the worker, which works until it is stopped; with --once, one sweep and it exits; with
# fleet work, it is one of the workers of a fleet.
#
#   docker run --read-only --env-file .env -p 127.0.0.1:8080:8080 IMAGE
#   docker run --rm --read-only --env-file .env IMAGE --once
#
# It writes no file, so a read-only root file system is fine. Settings come from the environment, or
# from a file that is mounted and named:
#
#   -v ./config.toml:/etc/users-sync/config.toml:ro -e USERS_SYNC_CONFIG=/etc/users-sync/config.toml
#
# Secrets may be files in /run/secrets, named like their variable: /run/secrets/DATABASE_URL.

# The bytecode that is made in one stage must be that of the Python in the other.
FROM python:3.13-slim AS base

FROM base AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY worker worker
# With what a fleet and OpenTelemetry need, which is loaded by those alone who use it. Of the
# libraries' own scripts and tests none is needed. (This folder is no package of an index.)
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-compile --prefix=/installed '.[fleet,otel]' \
    && find /installed/bin -type f ! -name users-sync -delete \
    && find /installed -type d -name tests -prune -exec rm -r {} +
# Neither the base image nor a read-only container has or keeps bytecode: without it each start would
# compile many hundreds of modules. The standard library's is taken along without the sources.
RUN compile="python -m compileall -q -f --invalidation-mode unchecked-hash" \
    && library=$(python -c 'import os; print(os.path.dirname(os.__file__))') \
    && $compile -s /installed -p /usr/local -x '/pygments/(formatters|lexers|styles)/[a-z]' /installed \
    && $compile -x '/(site-packages|ensurepip|idlelib|pydoc_data|tkinter|turtledemo|venv)/' "$library" \
    && mkdir /bytecode \
    && find "$library" -name __pycache__ ! -path '*/site-packages/*' \
        -exec cp --parents -r -t /bytecode {} + \
    && cp worker/cli/healthcheck.py /installed/lib/users-sync-healthcheck.py

FROM base
# Loopback, the default host, is out of reach from outside the container.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    USERS_SYNC_HTTP__HOST=0.0.0.0
# What runs in production installs nothing.
RUN rm -r /usr/local/bin/pip* /usr/local/lib/python3.*/ensurepip /usr/local/lib/python3.*/venv \
    /usr/local/lib/python3.*/site-packages/pip*
COPY --from=build /bytecode /
COPY --from=build /installed /usr/local
# A number, for Kubernetes cannot tell whether a name is root (runAsNonRoot).
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 8080
# It imports nothing of the worker, and takes some hundredths of a second.
HEALTHCHECK CMD ["python", "-I", "-S", "/usr/local/lib/users-sync-healthcheck.py"]
ENTRYPOINT ["users-sync"]
