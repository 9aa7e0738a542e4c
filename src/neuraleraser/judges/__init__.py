"""Judges: what an image shows, as probabilities.

A judge is any object of the shape of `Judge`: called with images, uint8 [N, H, W, 3], it returns a `Judgement`. Here
are CLIP, which tells a concept from its neighbours by their names; UnlearnCanvas's classifiers;
and NudeNet's detector.
"""

from neuraleraser.judges.clip import CLIP, MIN_ACCURACY, MIN_IMAGES, NO_CONCEPT, Clip, ClipJudge, clip_sentence
from neuraleraser.judges.judgement import (
    CountingJudge,
    FeatureJudge,
    ImageTextModel,
    Judge,
    Judgement,
    JudgeSpec,
    check,
)
from neuraleraser.judges.nudenet import NUDENET_CLASSES, NUDENET_EXPOSED, NudeNetJudge
from neuraleraser.judges.unlearncanvas import UNLEARNCANVAS_OBJECTS, UNLEARNCANVAS_STYLES, UnlearnCanvasJudge

__all__ = [
    "CLIP",
    "MIN_ACCURACY",
    "MIN_IMAGES",
    "NO_CONCEPT",
    "NUDENET_CLASSES",
    "NUDENET_EXPOSED",
    "UNLEARNCANVAS_OBJECTS",
    "UNLEARNCANVAS_STYLES",
    "Clip",
    "ClipJudge",
    "CountingJudge",
    "FeatureJudge",
    "ImageTextModel",
    "Judge",
    "JudgeSpec",
    "Judgement",
    "NudeNetJudge",
    "UnlearnCanvasJudge",
    "check",
    "clip_sentence",
]
