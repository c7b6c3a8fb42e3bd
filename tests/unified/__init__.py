"""Tests of models that draw."""
