FROM python:3.11.13-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql && rm -rf /var/lib/apt/lists/*
ENV PGDATA=/var/lib/postgresql/data
COPY postgres.sh /entrypoint.sh
ENTRYPOINT ["bash", "/entrypoint.sh"]
