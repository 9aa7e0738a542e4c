"""Headers of erasers, and what references were made with, at random."""

from __future__ import annotations

from hypothesis import strategies as st

from neuraleraser.concepts import CONCEPT_KINDS
from neuraleraser.eraser import Calibration, EraserHeader, Provenance
from neuraleraser.settings import MAX_SEED, FitSettings, SAeUronSettings, Sampling
from neuraleraser.sites import PROMPT_ROUTES, Fingerprint

_shares = st.floats(0, 1)
_number = st.floats(-1e38, 1e38)
_numbers = st.lists(_number, max_size=3).map(tuple)
_lines = st.text(st.characters(categories=["L", "N", "P"]), max_size=9)
_texts = st.lists(_lines, max_size=3).map(tuple)
_spans = st.lists(st.integers(0, MAX_SEED), min_size=2, max_size=2).map(lambda ends: (min(ends), max(ends)))
_digests = st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), max_size=3).map(tuple)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
_objects = st.dictionaries(st.text(max_size=9), _json, max_size=3)
_weights = st.dictionaries(st.text(max_size=8), st.lists(_number, min_size=4, max_size=4).map(tuple), max_size=3)

provenances = st.builds(
    Provenance,
    seeds=st.lists(_spans, max_size=3).map(tuple),
    prompts=_texts,
    phrasings=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    labels=_texts,
    sae=_lines,
    prompt_digests=_digests,
)
headers = st.builds(
    EraserHeader,
    st.just("Cats"),
    kind=st.sampled_from([None, *CONCEPT_KINDS]),
    routes=st.lists(st.sampled_from(PROMPT_ROUTES), max_size=3).map(tuple),
    base=_lines,
    time_scale=_lines,
    prompts=_texts,
    seeds=st.none() | _spans,
    settings=st.none()
    | st.builds(FitSettings, rank=st.integers(1, 256), guided_weight=st.floats(1e-6, 100))
    | st.builds(SAeUronSettings, num_features=st.none() | st.integers(1, 99), multiplier=st.floats(-99, 0)),
    sampling=st.none() | st.builds(Sampling, guidance_scale=st.floats(0, 99), pad_last_batch=st.booleans()),
    separation=_numbers,
    open_share=st.none() | _shares,
    text_left=st.none() | _shares,
    seconds=st.none() | st.floats(0, 1e9),
    peak_bytes=st.none() | st.integers(0, 2**63 - 1),
    method=_lines,
    made_for=st.none() | st.builds(Fingerprint, _lines, _lines, _lines, _weights),
    reference=st.none() | provenances,
    sae=_objects,
    measured=_objects,
    calibrated=st.none() | st.builds(Calibration, st.integers(0, 9), _numbers, _shares),
    more=st.dictionaries(st.text(max_size=9).map("x-{}".format), _json, max_size=3),
)
