"""Routing for many workers."""
