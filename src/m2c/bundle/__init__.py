"""What the bytes of a bundle mean. numpy, xxhash and the standard library; no torch."""
