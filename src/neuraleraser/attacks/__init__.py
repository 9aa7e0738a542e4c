"""Attacks: searches for an input, on some route, that brings a concept back. One file an attack.

An attack looks at the model itself or through a method that is applied, and returns what a call then takes.
"""

from __future__ import annotations

from neuraleraser.attacks.concept_vector_search import concept_direction, search_by_direction
from neuraleraser.attacks.continued_training import lora_added, train_lora
from neuraleraser.attacks.encoded_text import encoded_prompts
from neuraleraser.attacks.inverted_latents import inverted_latents, random_denoiser
from neuraleraser.attacks.learned_embeddings import WORD, learn_embeddings, learned_word
from neuraleraser.attacks.middle_step import draw_to_step, from_step
from neuraleraser.attacks.perturbed_encoding import perturb_encoding
from neuraleraser.attacks.prediction_matching import match_predictions
from neuraleraser.attacks.searched_tokens import searched_tokens
from neuraleraser.attacks.start_latents import search_start_latents
from neuraleraser.attacks.word_search import WordSearch, search_words, vocabulary_words

__all__ = [
    "WORD",
    "WordSearch",
    "concept_direction",
    "draw_to_step",
    "encoded_prompts",
    "from_step",
    "inverted_latents",
    "learn_embeddings",
    "learned_word",
    "lora_added",
    "match_predictions",
    "perturb_encoding",
    "random_denoiser",
    "search_by_direction",
    "search_start_latents",
    "search_words",
    "searched_tokens",
    "train_lora",
    "vocabulary_words",
]
