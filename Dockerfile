# A device: agent, training and prediction without torch, as a user without rights. For both architectures:
#   docker buildx build --platform linux/amd64,linux/arm64 --tag edge-runtime .
#
# Limit its memory from outside: `--memory auto` (the default of `join`) sees the container's limit and stays below it, and
# over it the kernel takes the training process first. --memory-swap as large as --memory means no swap.
#   docker run --detach --restart unless-stopped --memory 600m --memory-swap 600m --cpus 1.5 \
#     --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     --volume edge-state:/var/lib/edge-runtime --volume /srv/edge:/srv/edge:ro \
#     edge-runtime join --config /srv/edge/pi-1.toml --data /srv/edge/texts.csv
# The files below /srv/edge must be readable by user 10001: sudo chown 10001 /srv/edge/pi-1.toml /srv/edge/texts.csv

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml setup.cfg setup.py README.md LICENSE ./
COPY edge_runtime edge_runtime
COPY coordinator coordinator
COPY models models
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim
COPY --from=build /wheel /wheel
# Wheels alone: without a compiler, an architecture that has none fails here with the package's name.
RUN pip install --no-cache-dir --only-binary=:all: /wheel/*.whl && rm -r /wheel \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/edge-runtime --shell /usr/sbin/nologin edge-runtime \
 && install --directory --owner=edge-runtime --group=edge-runtime --mode=0700 /var/lib/edge-runtime
ENV EDGE_CACHE=/var/lib/edge-runtime/.cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/edge-runtime
VOLUME /var/lib/edge-runtime
ENTRYPOINT ["edge-runtime"]
CMD ["--help"]
