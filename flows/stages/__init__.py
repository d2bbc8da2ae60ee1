"""The stages of the pipeline: plain functions of recipe sections and folders. They know no engine."""
