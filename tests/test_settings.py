"""Settings: every number has its bounds, and what is out of them is one sentence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from helpers.pipelines import stable_diffusion
from neuraleraser.canvas.recipe import TrainCanvas
from neuraleraser.errors import SettingsError
from neuraleraser.sae import TrainSettings
from neuraleraser.sampling import generate
from neuraleraser.settings import DemoSettings, FitSettings, InspectSettings, Sampling, StreamSettings

SETTINGS = [
    Sampling(),
    StreamSettings(),
    InspectSettings(),
    FitSettings(),
    TrainCanvas(),
    TrainSettings(n_features=8, k=2, steps=1),
]
WRONG = [-(2**200), -1.5, 2**200, 1e300, math.nan, math.inf, -math.inf, "many", [1], True]
FIELDS = [
    (settings, field.name)
    for settings in SETTINGS
    for field in dataclasses.fields(settings)
    if str(field.type).split(" |")[0] in ("int", "float")
]


@pytest.mark.parametrize(("settings", "name"), FIELDS, ids=[f"{type(s).__name__}.{n}" for s, n in FIELDS])
def test_every_number_is_bounded(settings: Any, name: str):
    for value in WRONG:
        if name == "factor" and value == -1.5:  # may be negative
            continue
        with pytest.raises(SettingsError) as caught:
            dataclasses.replace(settings, **{name: value})
        assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_there_are_numbers_to_look_at():
    assert len(FIELDS) > 40 and {name for _, name in FIELDS} >= {
        "steps",
        "guidance_scale",
        "learning_rate",
        "dead_after",
    }


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FitSettings(num_pairs=0), "pairs is 0"),
        (lambda: FitSettings(rank=0), "rank is 0"),
        (lambda: FitSettings(guided_weight=0), "guided_weight is 0"),
        (lambda: FitSettings(seed=990), "tests are generated with seeds above 999"),
        (lambda: FitSettings(seed=10_000), "tests are generated with seeds above 999"),
        (lambda: Sampling(num_inference_steps=1001), "steps is 1001"),
        (lambda: Sampling(strength=0), "strength is 0"),
        (lambda: Sampling(pad_last_batch="no"), "pad_last_batch is 'no': pass True or False"),  # type: ignore[arg-type]
        (lambda: Sampling(num_inference_steps=2.0), "steps is 2.0"),
        (lambda: Sampling(height=64), "height is 64 and width 0: pass both"),
        (lambda: InspectSettings(num_images=0), "images is 0"),
        (lambda: InspectSettings(seed=2**63 - 2), "seed is"),
        (lambda: DemoSettings(phrases=()), "there are no phrases"),
        (lambda: StreamSettings(vectors_per_image=0), "vectors_per_image is 0"),
    ],
)
def test_the_edges(make: Any, says: str):
    with pytest.raises(SettingsError, match=says):
        make()


def test_whole_numbers_of_other_libraries_are_whole_numbers():
    import numpy as np

    assert Sampling(num_inference_steps=np.int64(3), guidance_scale=np.float32(2)).num_inference_steps == 3
    assert FitSettings(seed=910).seed == 910 and FitSettings(guided_weight=1).guided_weight == 1


def test_more_steps_than_the_schedule_has():
    pipe = stable_diffusion()
    pipe.scheduler.register_to_config(num_train_timesteps=10)
    with pytest.raises(
        SettingsError, match=r"StableDiffusionPipeline refuses these settings: `num_inference_steps`: 11"
    ):
        generate(pipe, ["a"], [0], Sampling(num_inference_steps=11, batch_size=1))


def test_a_bug_in_a_pipeline_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    pipe = stable_diffusion()

    def bug(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(pipe.unet, "forward", bug)
    with pytest.raises(ValueError, match="a bug"):
        generate(pipe, ["a"], [0], Sampling(num_inference_steps=1, batch_size=1))
