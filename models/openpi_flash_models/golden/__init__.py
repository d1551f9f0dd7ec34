"""Checks of both backends against golden data: inputs and outputs that were made by running openpi itself.

`python -m openpi_flash_models.golden DIR` runs them all. `compare.py` has what checks share, each other module is one
kind of check, and `__main__.py` lists them.
"""
