"""Adapters for trainers: one module per framework, the only one that imports it."""
