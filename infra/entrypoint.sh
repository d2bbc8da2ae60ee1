#!/usr/bin/env bash
# FROM_FILE_NAME=/run/secrets/x becomes NAME=<what the file says>: secrets stand in files, not in compose.yaml.
set -euo pipefail
for variable in $(compgen -e FROM_FILE_ || true); do
    export "${variable#FROM_FILE_}=$(<"${!variable}")"
done
exec "$@"
