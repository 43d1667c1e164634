"""What the bytes of a bundle mean. numpy, zstandard, xxhash and the standard library; no torch."""
