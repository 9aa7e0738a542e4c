"""Architectures: which features fire while an SAE trains. One class and one file each; `ARCHITECTURES` names them.

Afterwards each feature fires by a threshold of its own, so that all end in the same `SAE`.
"""

from __future__ import annotations

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: dict[str, str] = {
    "batchtopk": "neuraleraser.sae.architectures.batchtopk:BatchTopK",
    "topk": "neuraleraser.sae.architectures.topk:TopK",
    "jumprelu": "neuraleraser.sae.architectures.jumprelu:JumpReLU",
    "matryoshka": "neuraleraser.sae.architectures.matryoshka:Matryoshka",
}
"""Module and class by the name that settings have for it. The module loads when it is first trained with, so that
settings and the command line stay free of torch."""
