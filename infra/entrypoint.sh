#!/usr/bin/env bash
# DVC_REMOTE_URL=s3://bucket becomes DVC's default remote in place of the checkout's own folder, which no other machine reads.
# FROM_FILE_NAME=/run/secrets/x becomes NAME=<what the file says>: secrets stand in files, not in compose.yaml.
set -euo pipefail
for variable in $(compgen -e FROM_FILE_ || true); do
    export "${variable#FROM_FILE_}=$(<"${!variable}")"
done
if [ -n "${DVC_REMOTE_URL:-}" ]; then
    printf '[core]\n    remote = shared\n['"'"'remote "shared"'"'"']\n    url = %s\n' "$DVC_REMOTE_URL" \
        > "$(dirname "$0")/../.dvc/config.local"
fi
exec "$@"
