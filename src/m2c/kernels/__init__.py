"""Arithmetic on packed rows. Reference kernels in torch; faster ones must equal them in tests."""
