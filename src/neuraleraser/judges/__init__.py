"""Judges: what an image shows, as probabilities.

A judge is any callable from images, uint8 [N, H, W, 3], to a `Judgement`; there is nothing to inherit from. Here are
the canvas's own two; CLIP, which tells a concept from its neighbours by their names; UnlearnCanvas's classifiers; and
NudeNet's detector.
"""

from neuraleraser.judges.canvas import CanvasJudge
from neuraleraser.judges.clip import CLIP, LEAST_ACCURACY, LEAST_IMAGES, NONE, ClipJudge, clip_judge, sentence
from neuraleraser.judges.judgement import Judgement, check
from neuraleraser.judges.nudenet import NUDENET_CLASSES, NUDENET_EXPOSED, NudeNetJudge
from neuraleraser.judges.unlearncanvas import UNLEARNCANVAS_OBJECTS, UNLEARNCANVAS_STYLES, UnlearnCanvasJudge

__all__ = [
    "CLIP",
    "LEAST_ACCURACY",
    "LEAST_IMAGES",
    "NONE",
    "NUDENET_CLASSES",
    "NUDENET_EXPOSED",
    "UNLEARNCANVAS_OBJECTS",
    "UNLEARNCANVAS_STYLES",
    "CanvasJudge",
    "ClipJudge",
    "Judgement",
    "NudeNetJudge",
    "UnlearnCanvasJudge",
    "check",
    "clip_judge",
    "sentence",
]
