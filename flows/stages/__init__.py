"""The stages of the pipeline: plain functions of recipe sections and folders, independent of the orchestration."""
