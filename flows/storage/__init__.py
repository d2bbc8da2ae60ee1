"""Downloads and S3."""
