"""Tests of the measures and the manifests."""
