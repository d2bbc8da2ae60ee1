#!/usr/bin/env bash
# Stand-ins for the images of infra/compose.yaml that are not ours, where no registry can be had: made from the Python
# base image with Debian's PostgreSQL and moto. Same names, ports, arguments and secrets; for infra/smoke.sh alone:
#   ENGINE=podman tests/containers/build.sh, then infra/smoke.sh. BUILD_OPTIONS go to each build.
set -euo pipefail
cd "$(dirname "$0")"
image() { sed -n "s/^ *image: \(.*$1[^@]*\).*/\1/p" ../../infra/compose.yaml | head -n 1; }
for name in postgres seaweedfs; do
    # shellcheck disable=SC2086  # several options
    "${ENGINE:-docker}" build ${BUILD_OPTIONS:-} --file "$name.Dockerfile" --tag "$(image "$name")" .
done
