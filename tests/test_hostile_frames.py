"""Frames that lie, in both decoders: they agree on what is refused and on every weight (R12).

A trial is BATCH mutations. `make sanitize` runs this with a library that finds any read or write
beyond a buffer.
"""

import random

import pytest
import torch
from hostile import BATCH, judge
from hostile_frames import Case
from trials import trials

from m2c.errors import M2CError
from m2c.kernels.native import LIBRARY

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built"),
]


def test_frames_decode_as_the_reference_does() -> None:
    for trial in trials("R12-frames", ci=1, campaign=2000):
        with trial as seed:
            for i in range(BATCH):
                compare(Case.mutated(random.Random(f"R12-frames {seed} {i}")))


def compare(case: Case) -> None:
    native, reference = (judge(decode, case.words) for decode in (case.native, case.reference))
    if not case.finite:  # any weights will do, or none
        return
    refused = isinstance(native, M2CError)
    assert refused == isinstance(reference, M2CError), case.words
    if not refused:
        assert torch.equal(native.view(torch.int16), reference.view(torch.int16)), case.words
