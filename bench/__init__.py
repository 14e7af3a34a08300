"""Measurements over real recordings; each program ends with one line of JSON."""
