"""Scores by a vision-language model: a real architecture with random weights, and the arithmetic in closed form."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.text.tiny_vlm import WORDS, tiny_vlm
from tests.training.tiny import tiny_cascade
from training.config.experiment import ExtractorConfig
from training.evaluation import evaluate
from training.evaluation.extractors.answers import YES, Answerer, open_answerer, spellings
from training.evaluation.extractors.base import file_sha256, open_extractors
from training.evaluation.measure import mean_where
from training.evaluation.metrics.answers import arithmetic_mean, geometric_mean


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExtractorConfig:
    folder = tmp_path_factory.mktemp("vlm")
    tiny_vlm(folder, words=[*WORDS, "Yes", "yes", "no", "four", "4"])
    return ExtractorConfig(kind="vlm", path=str(folder), sha256=file_sha256(folder / "model.safetensors"), batch=2)


@pytest.fixture(scope="module")
def answerer(config: ExtractorConfig) -> Answerer:
    found = open_answerer({"judge": config})
    assert found is not None and [e.name for e in open_extractors({"judge": config})][-1] == "random_filters_64"
    return found


PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
CAPTIONS = ["a red circle", "a blue square, much longer than the others", "four"]


def test_a_score_is_the_probability_of_the_next_token(answerer: Answerer) -> None:
    scores = answerer.vqa_scores(PICTURES, CAPTIONS)
    assert ((scores > 0) & (scores < 1)).all() and len(set(scores)) == 3
    alone = [answerer.vqa_scores([p], [c])[0] for p, c in zip(PICTURES, CAPTIONS, strict=True)]
    assert scores == pytest.approx(alone, rel=1e-5), "padding changes nothing"
    question = 'Does this figure show "a red circle"? Please answer yes or no.'
    talk = [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(PICTURES[0])},
                                         {"type": "text", "text": question}]}]  # fmt: skip
    inputs = answerer._processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt",
                                                     add_generation_prompt=True)  # fmt: skip
    made = answerer._model.generate(**inputs, max_new_tokens=1, do_sample=False, output_scores=True,
                                    return_dict_in_generate=True)  # fmt: skip
    chances = torch.softmax(made.scores[0][0].double(), 0)
    yes = answerer._processor.tokenizer.convert_tokens_to_ids(["Yes", "yes"])
    assert scores[0] == pytest.approx(float(chances[yes].sum()), rel=1e-5), "as the model's own generation has it"


def test_soft_tifa_asks_every_question(answerer: Answerer) -> None:
    asked = [[["How many?", "four"], ["Is it red?", "Yes"]], [["Is it red?", "Yes"]], [["How many?", "four"]]]
    chances = answerer.soft_tifa(PICTURES, asked)
    assert chances.shape == (3, 2) and np.isnan(chances).tolist() == [[False, False], [False, True], [False, True]]
    one = answerer.probabilities([PICTURES[1]], ["Is it red? Answer in one word."], [YES])
    assert chances[1, 0] == pytest.approx(one[0], rel=1e-5)


def test_means_in_closed_form() -> None:
    chances = np.array([[0.25, 1.0], [0.5, np.nan], [0.0, 1.0]])
    assert arithmetic_mean(chances).tolist() == [0.625, 0.5, 0.5]
    assert geometric_mean(chances)[:2] == pytest.approx([0.5, 0.5]) and geometric_mean(chances)[2] < 1e-100
    figure = mean_where(chances, np.array([[True, True], [True, False], [False, False]]))
    assert figure.value == pytest.approx((0.25 + 1 + 0.5) / 3) and figure.samples.sum() == pytest.approx(0)
    assert spellings("four") == ("four", " four", "Four", " Four", "4", " 4") and "yes" in spellings("Yes")


def test_stage_by_stage_in_the_report(config: ExtractorConfig, tmp_path: Path) -> None:
    tiny_cascade().save(str(tmp_path / "bundle"))
    lines = [
        {"prompt": "four red circle", "vqa_list": [["How many?", "four"], ["Is it red?", "Yes"]],
         "skills": ["count", "attribute"], "atom_count": 2},
        {"prompt": "blue square", "vqa_list": [["Is it blue?", "Yes"]], "skills": ["attribute"], "atom_count": 1},
    ]  # fmt: skip
    file = tmp_path / "list.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"prompts": str(file), "samples": 2, "extractors": {"judge": asdict(config)}, "gpus": False, "steps": 1}
    found = evaluate(str(tmp_path / "bundle"), output=str(tmp_path / "out"), **settings)
    assert list(found["vqa_score"]) == list(found["soft_tifa_am"]) == ["base", "sr"]
    am, gm = (found[f"soft_tifa_{name}"]["sr"]["value"] for name in ("am", "gm"))
    assert 0 < gm < am < 1 and set(found["soft_tifa_skill"]) == {"count", "attribute"}
    assert found["soft_tifa_atoms"]["1"]["value"] == pytest.approx(2 * gm - found["soft_tifa_atoms"]["2"]["value"])
    assert found["protocol"]["extractors"]["judge"]["sha256"] == config.sha256
    page = (tmp_path / "out" / "report.html").read_text()
    assert "VQAScore on base" in page and "Soft-TIFA by skill on count" in page and "prompts by VQAScore" in page
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ConfigError, match="1 of 2 lines have a vqa_list; all lines or none must have one"):
        evaluate(str(tmp_path / "bundle"), output=str(tmp_path / "out"), **settings)


def test_a_directory_without_such_a_model_is_refused(config: ExtractorConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.sha256: set it to that of the weights"):
        open_answerer({"judge": ExtractorConfig(kind="vlm", path=config.path)})
    shutil.copytree(config.path, tmp_path / "vlm")
    (tmp_path / "vlm" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="its processor has no chat template"):
        open_answerer({"judge": ExtractorConfig(kind="vlm", path=str(tmp_path / "vlm"), sha256=config.sha256)})
    (tmp_path / "vlm" / "config.json").unlink()
    with pytest.raises(DataError, match="cannot be loaded as a vision-language model"):
        open_answerer({"judge": ExtractorConfig(kind="vlm", path=str(tmp_path / "vlm"), sha256=config.sha256)})
