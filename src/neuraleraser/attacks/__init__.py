"""Attacks."""

from __future__ import annotations

from neuraleraser.attacks.learned_embeddings import WORD, learn_embeddings, learned_word

__all__ = ["WORD", "learn_embeddings", "learned_word"]
