"""m2c: language models that do not fit in memory, decoded from SSD through a three-level cache."""

__version__ = "0.1.0"
