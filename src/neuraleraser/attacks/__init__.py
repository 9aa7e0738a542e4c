"""Attacks: searches for an input, on some route, that brings a concept back. One file an attack.

An attack looks at the model itself or through a method that is applied, and returns what a call then takes.
"""

from __future__ import annotations

from neuraleraser.attacks.inverted_latents import inverted_latents, random_denoiser
from neuraleraser.attacks.learned_embeddings import WORD, learn_embeddings, learned_word
from neuraleraser.attacks.searched_tokens import searched_tokens

__all__ = ["WORD", "inverted_latents", "learn_embeddings", "learned_word", "random_denoiser", "searched_tokens"]
