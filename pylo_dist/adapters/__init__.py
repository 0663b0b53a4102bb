"""Adapters: they say where a rank's elements live, bring gradients in and parameters out."""
