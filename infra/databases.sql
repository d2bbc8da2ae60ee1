-- Beside the database of Prefect; both servers call a table alembic_version.
create database mlflow;
