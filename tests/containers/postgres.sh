#!/usr/bin/env bash
# What the official image does of what compose.yaml uses: a database and user at the first start, then the server.
set -euo pipefail
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
install --directory --owner postgres --mode 700 "$PGDATA"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    install --owner postgres --mode 600 "$POSTGRES_PASSWORD_FILE" /tmp/password
    as initdb --encoding UTF8 --username "$POSTGRES_USER" --pwfile /tmp/password --auth-host scram-sha-256 --auth-local trust
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    as pg_ctl --wait --options "-c listen_addresses=" start
    as createdb --username "$POSTGRES_USER" "$POSTGRES_DB"
    for script in /docker-entrypoint-initdb.d/*.sql; do
        as psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 --file "$script"
    done
    as pg_ctl --wait stop
fi
exec setpriv --reuid postgres --regid postgres --init-groups postgres -c listen_addresses='*'
