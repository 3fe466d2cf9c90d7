"""Packaging of pctrain; pyproject.toml has it all. This file is here for tools that look for a setup.py."""

from setuptools import setup

setup()
