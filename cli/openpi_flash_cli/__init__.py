"""The `openpi-flash` command."""
