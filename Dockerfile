# syntax=docker/dockerfile:1

# The image of the worker, which works until it is stopped; with --once, one sweep and it exits.
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

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY worker worker
# Without pip in it: what runs in production installs nothing.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m venv --without-pip /opt/users-sync \
    && pip --python /opt/users-sync/bin/python install --no-cache-dir /wheels/*.whl

FROM python:3.13-slim
COPY --from=build /opt/users-sync /opt/users-sync
# Loopback, the default host, is out of reach from outside the container.
ENV PATH=/opt/users-sync/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    USERS_SYNC_HTTP__HOST=0.0.0.0
# A number, for Kubernetes cannot tell whether a name is root (runAsNonRoot).
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 8080
HEALTHCHECK CMD ["users-sync", "probe"]
ENTRYPOINT ["users-sync"]
