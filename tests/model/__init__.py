"""Tests of the tensors."""
