"""Scores pictures by questions to a vision-language model in transformers format from a local directory.

A score is a probability, not a text: that of the right answer's first token, so it changes smoothly with the picture.

VQAScore (Lin et al. 2024, arXiv 2404.01291): P("Yes") to "does this figure show CAPTION?".
Soft-TIFA (Kamath et al. 2025, arXiv 2512.16853, the score of GenEval 2): P(answer) to each question about a prompt; the
arithmetic mean judges single facts, the geometric mean whole prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.common.errors import DataError
from training.config.experiment import ExtractorConfig
from training.evaluation.extractors.base import verified
from training.text.vision_language import load_vlm

SHOWS = 'Does this figure show "{}"? Please answer yes or no.'
"""VQAScore's question."""
ASKS = "{} Answer in one word."
"""Soft-TIFA's question."""
YES = ("Yes", "yes", " Yes", " yes")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}


def spellings(answer: str) -> tuple[str, ...]:
    """Return the ways a model may write an answer: `four`, `Four`, `4`, each with and without a leading blank."""
    word = answer.strip()
    forms = [word, word.capitalize(), word.lower(), *([DIGITS[word.lower()]] if word.lower() in DIGITS else [])]
    return tuple(dict.fromkeys(spelling for form in forms for spelling in (form, f" {form}")))


class Answerer:
    """A vision-language model that returns probabilities of answers.

    Args:
        model: returns `.logits` for the output of `processor` on a conversation.
        sha256: SHA-256 of the model's weights.
        batch: questions per forward pass.
    """

    def __init__(self, name: str, model: Any, processor: Any, sha256: str, batch: int, device: str) -> None:
        self.name, self.sha256, self.batch, self.device = name, sha256, batch, device
        self._model, self._processor = model, processor

    def describe(self) -> dict[str, Any]:
        """Return the description for a protocol."""
        return {"width": 0, "sha256": self.sha256, "rule": f"P(first token of the answer); {SHOWS} / {ASKS}"}

    def probabilities(
        self, pictures: Sequence[np.ndarray], questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Return the probability that the next token starts one of the given spellings of the answer, (N,), 0 to 1.

        Args:
            pictures: uint8 (H, W, 3), one per question.
            answers: for each question, the spellings of its answer.

        Raises:
            DataError: a probability is not finite.
        """
        found: list[float] = []
        for at in range(0, len(questions), self.batch):
            rows = slice(at, at + self.batch)
            logits = self._next_token([Image.fromarray(p) for p in pictures[rows]], questions[rows])
            chances = torch.softmax(logits.double(), dim=-1)
            for chance, forms in zip(chances, answers[rows], strict=True):
                found.append(float(chance[self._first_tokens(forms)].sum()))
        values = np.array(found)
        if not np.isfinite(values).all():
            raise DataError(f"{self.name}: {int((~np.isfinite(values)).sum())} of {len(values)} answers are not finite")
        return values

    def _next_token(self, pictures: list[Image.Image], questions: Sequence[str]) -> torch.Tensor:
        """Return the logits of the answer's first token, (N, V)."""
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
            for p, q in zip(pictures, questions, strict=True)
        ]
        inputs = self._processor.apply_chat_template(
            talks,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device)
        with torch.inference_mode():
            return self._model(**inputs).logits[:, -1]

    def _first_tokens(self, forms: Sequence[str]) -> list[int]:
        tokenizer = self._processor.tokenizer
        tokens = (tokenizer.encode(form, add_special_tokens=False) for form in forms)
        return sorted({ids[0] for ids in tokens if ids and ids[0] != tokenizer.unk_token_id})

    def vqa_scores(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """Return the VQAScores, (N,), 0 to 1; one caption per picture, uint8 (H, W, 3)."""
        return self.probabilities(pictures, [SHOWS.format(c) for c in captions], [YES] * len(captions))

    def soft_tifa(self, pictures: Sequence[np.ndarray], asked: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
        """Return the probability of the right answer to each question about each picture, (N, K); NaN beyond a
        picture's last question.

        Args:
            asked: for each picture, its (question, answer) pairs, `vqa_list` of GenEval 2.
        """
        flat = [(row, pair) for row, pairs in enumerate(asked) for pair in pairs]
        chances = self.probabilities(
            [pictures[row] for row, _ in flat],
            [ASKS.format(question) for _, (question, _) in flat],
            [spellings(answer) for _, (_, answer) in flat],
        )
        found = np.full((len(asked), max(map(len, asked), default=0)), np.nan)
        places = [(row, column) for row, pairs in enumerate(asked) for column in range(len(pairs))]
        for (row, column), chance in zip(places, chances, strict=True):
            found[row, column] = chance
        return found


def open_answerer(configs: Mapping[str, ExtractorConfig], device: str = "cpu") -> Answerer | None:
    """Open the vision-language model of `evaluation.extractors`; None if there is none.

    Raises:
        ConfigError, DataError: its files are missing, do not have the stated SHA-256, or are not such a model.
    """
    for name, config in configs.items():
        if config.kind != "vlm":
            continue
        digest = verified(name, config)
        model, processor = load_vlm(f"evaluation.extractors.{name}.path", config.path, "auto")
        if getattr(processor, "chat_template", None) is None:
            raise DataError(
                f"evaluation.extractors.{name}.path={config.path}: its processor has no chat template, so it cannot "
                "answer questions; use an instruction-tuned model"
            )
        return Answerer(name, model.to(device), processor, digest, config.batch, device)
    return None
