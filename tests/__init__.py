"""Tests, laid out as the code is; what they share is in support/."""
