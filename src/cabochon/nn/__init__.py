"""Layers without names: what they compute, not what is stored or where."""
