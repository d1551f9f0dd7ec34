"""Robots: which observation entries they send, and what their actions look like."""
