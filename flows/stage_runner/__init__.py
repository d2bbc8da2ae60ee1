"""Everything that cm stage does around a stage."""
