"""The one place the version is written, importable without torch."""

__version__ = "0.1.0"
