"""Tests of model/moss/."""
