#!/usr/bin/env bash
# Make the files of infra/secrets/ that compose.yaml names; those that are there stay as they are.
# The containers' users must read the files, whose owner they are not: the folder alone keeps other users out.
set -euo pipefail
cd "$(dirname "$0")/secrets"
chmod 700 .
make() { # NAME: from standard input
    if [ -e "$1" ]; then cat > /dev/null; else cat > "$1"; fi
    chmod 644 "$1"
}
random() { openssl rand -hex 24 | tr -d '\n'; }
credentials() { printf '[default]\naws_access_key_id=%s\naws_secret_access_key=%s\n' "$1" "$(<"s3_$1_password")"; }
for name in postgres s3_root s3_worker s3_mlflow mlflow mlflow_cookie metrics; do random | make "${name}_password"; done
echo "cm:$(random)" | make prefect_login
place="cm:$(<postgres_password)@postgres"
echo "postgresql+asyncpg://$place/prefect" | make prefect_database_url
echo "postgresql+psycopg2://$place/mlflow" | make mlflow_database_url
for user in root worker mlflow; do credentials "$user" | make "aws_credentials_$user"; done
identity() { # NAME ACTION...: a user of the object store, whose key is called like it
    local actions; actions=$(printf '"%s", ' "${@:2}")
    printf '{"name": "%s", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": [%s]}' \
        "$1" "$1" "$(<"s3_$1_password")" "${actions%, }"
}
of() { printf '%s ' Read:"$1" Write:"$1" List:"$1"; } # a bucket
# shellcheck disable=SC2046  # several words
printf '{"identities": [%s,\n%s,\n%s]}\n' "$(identity root Admin)" "$(identity worker $(of dvc) $(of states))" \
    "$(identity mlflow $(of mlflow))" | make s3_identities
