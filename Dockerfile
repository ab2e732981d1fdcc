# syntax=docker/dockerfile:1
# The image of the loader: distroless Python of Debian 13 (Python 3.13), and one file.
#
# Why distroless: no shell, no package manager, nothing to run but Python; the same user (65532,
# "nonroot") as Envoy's distroless image, which matters because both touch the same files; glibc,
# as everywhere the loader is tested; patched by Debian. An Alpine image is as small, but brings a
# shell, pip and another libc, and starts as root.
#
#   docker buildx build --platform linux/amd64,linux/arm64 -t registry.example/loader:2.0.0 .
#
# A reproducible build names the base by digest and takes its times from the last commit:
#
#   docker buildx build --build-arg PYTHON_DIGEST="$(crane digest gcr.io/distroless/python3-debian13:nonroot)" \
#     --build-arg SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" \
#     --output type=image,name=registry.example/loader:2.0.0,push=true,rewrite-timestamp=true .

ARG PYTHON=gcr.io/distroless/python3-debian13:nonroot
# sha256:... of PYTHON; empty takes the newest, which is what a nightly rebuild wants.
ARG PYTHON_DIGEST=

# Byte code is the same on every machine: compiled once, on the one that builds. The same Python as
# below, or the byte code would not load; its hash is marked "unchecked", so that nothing looks for
# the source, and no time gets into the image.
FROM --platform=$BUILDPLATFORM ${PYTHON}${PYTHON_DIGEST:+@$PYTHON_DIGEST} AS build
USER 0:0
WORKDIR /build
COPY loader.py app/loader.py
RUN ["python3", "-I", "-S", "-c", "import os, py_compile; py_compile.compile('app/loader.py', 'app/loader.pyc', dfile='/app/loader.py', doraise=True, optimize=0, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH); os.makedirs('srv/runtime')"]
USER 65532:65532

FROM ${PYTHON}${PYTHON_DIGEST:+@$PYTHON_DIGEST}
ARG VERSION=2.0.0
ARG REVISION=
ARG PYTHON
ARG PYTHON_DIGEST
LABEL org.opencontainers.image.title="envoy-xds-configmap-loader" \
      org.opencontainers.image.description="Kubernetes ConfigMaps, Services and Secrets as files that Envoy's filesystem xDS reloads" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON}" \
      org.opencontainers.image.base.digest="${PYTHON_DIGEST}"
# The source stays beside the byte code: an operator can read what runs, and tracebacks show it.
COPY --from=build /build/app/ /app/
COPY LICENSE /app/LICENSE
# A volume that is mounted here for the first time takes over this owner.
COPY --from=build --chown=65532:65532 /build/srv/ /srv/
# Names to call it by: the Go tool's, for manifests with `command: [crossover]`, and its own. A script
# would be compiled at each start; Python's own loader of byte code checks its magic number and runs it.
COPY --chmod=755 <<"EOF" /usr/local/bin/crossover
#!/usr/bin/python3 -IS
from importlib.machinery import SourcelessFileLoader
exec(SourcelessFileLoader("__main__", "/app/loader.pyc").get_code("__main__"))
EOF

COPY --chmod=755 <<"EOF" /usr/local/bin/envoy-xds-configmap-loader
#!/usr/bin/python3 -IS
from importlib.machinery import SourcelessFileLoader
exec(SourcelessFileLoader("__main__", "/app/loader.pyc").get_code("__main__"))
EOF

USER 65532:65532
# Straight from the byte code (compiling the source takes longer than the first snapshot does);
# -I -S: nothing but the standard library can be imported.
ENTRYPOINT ["python3", "-I", "-S", "/app/loader.pyc"]
