"""Probes on frozen representations."""
