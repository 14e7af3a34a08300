"""Protocols that people already speak, translated from and to the log.

An adaptor only translates: its streams use the same session, timeline, log and hub as `/v1/stream/NAME`.
"""
