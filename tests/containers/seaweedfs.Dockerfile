FROM python:3.11.13-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends curl && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "moto[s3,server]"
COPY seaweedfs.py /weed.py
ENTRYPOINT ["python", "/weed.py"]
