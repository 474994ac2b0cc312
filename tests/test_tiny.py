"""The embedded default: its splits, its curriculum, its checkpoint, its exam."""

import hashlib
import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.data import ConversationDataset, digits
from ovis25.data.digits import originals
from ovis25.data.digits.kinds import sum_with_thinking
from ovis25.evaluate.digits import iou, is_correct, parse_box, run_exam
from ovis25.files import REPOSITORY_ROOT
from ovis25.tiny.build import TINY_LIMITS, TINY_NAME, build_tiny, resolve_model_path
from ovis25.training.config import load_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


def test_the_splits_share_no_digit_and_no_text_question():
    sizes = {split: set(originals.digit_indices(split)) for split in originals.SPLITS}
    assert {split: len(indices) for split, indices in sizes.items()} == {"train": 1297, "validation": 200, "test": 300}
    assert len(set.union(*sizes.values())) == 1797
    asked = {s: {q.prompt for q in digits.questions(s, "arithmetic", 60)} for s in originals.SPLITS}
    assert not asked["train"] & asked["validation"] and not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]


def test_a_sample_is_always_the_same_and_strips_vary_in_size():
    first, again = (digits.DigitStrips("train", 40, curriculum=True)[30] for _ in range(2))
    assert first["conversations"] == again["conversations"] and first["image"].tobytes() == again["image"].tobytes()
    sizes = {digits.make_strip(random.Random(seed), "test", 4).image.size for seed in range(60)}
    assert len(sizes) > 20 and {width > height for width, height in sizes} == {True, False}


def test_pictures_and_words_are_those_of_every_version_before():
    """A digest over samples of all kinds, made when the pixels still came from scikit-learn itself."""
    digest = hashlib.sha256()
    for source in ("tiny:train:400", "tiny:validation:50", "tiny-crop:test:50"):
        for sample in digits.parse_source(source):
            digest.update(json.dumps(sample["conversations"]).encode())
            images = sample.get("image", [])
            for image in images if isinstance(images, list) else [images]:
                digest.update(str(image.size).encode() + image.tobytes())
    assert digest.hexdigest() == "0e620e2c32ea8a59ad58decd26d345b3719dd88ad72c6a9053d4f4a17b7ff1c7"


def test_the_digits_are_scikit_learns():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    pixels, labels = originals.read_digits()
    assert pixels.dtype == np.uint8 and (pixels == theirs.images).all() and (labels == theirs.target).all()


def test_the_curriculum_begins_with_single_digits_and_ends_with_the_mix():
    rows = digits.parse_source("tiny:train:2000")
    begin = [rows.question(index) for index in range(200)]
    reading = [question for question in begin if question.kind == "reading"]
    assert len(reading) > 170 and sum(len(question.answer) == 1 for question in reading) > 160
    end = [rows.question(index) for index in range(1000, 2000)]
    shares = {kind: sum(question.kind == kind for question in end) / 1000 for kind in digits.KINDS}
    assert all(abs(shares[kind] - share) < 0.06 for kind, share in digits.KINDS.items())
    assert {question.kind for question in map(digits.parse_source("tiny:validation:60").question, range(60))} == set(
        digits.KINDS
    )


def test_thinking_reads_and_adds():
    assert sum_with_thinking([3, 8, 1]) == "<think>\n381\n3+8=11\n11+1=12\n</think>\n\n12"


@pytest.mark.parametrize("source", ["tiny:train", "tiny:train:0", "tiny:train:many", "tiny:night:5", "small:train:5"])
def test_a_wrong_source_says_how_it_is_written(source):
    with pytest.raises(ValueError, match=source):
        digits.parse_source(source)


def test_the_checkpoint_loads_and_is_built_once(tiny, monkeypatch, tmp_path):
    model = Ovis2_5.from_pretrained(tiny)
    assert 0.5e6 < model.num_parameters() < 2e6
    assert Ovis2_5Processor.from_pretrained(tiny).limits == TINY_LIMITS
    monkeypatch.setenv("OVIS25_HOME", str(tmp_path))
    folder = resolve_model_path(TINY_NAME)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert resolve_model_path(TINY_NAME) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert resolve_model_path("other") == "other"


def test_every_generated_kind_and_the_sample_data_suit_the_tiny_model(tiny):
    processor = Ovis2_5Processor.from_pretrained(tiny)
    generated = ConversationDataset(digits.parse_source("tiny:train:300"), processor, **asdict(TINY_LIMITS))
    assert generated.statistics().longest < 128
    shipped = REPOSITORY_ROOT / "src_theo" / "sample_data" / "train_data.json"
    assert len(ConversationDataset(shipped, processor, **asdict(TINY_LIMITS))) == len(json.loads(shipped.read_text()))


def test_the_shipped_config_takes_samples_in_order_and_stops_on_the_third_split():
    config = load_config("train_config_tiny.json")
    assert config.trainer["train_sampling_strategy"] == "sequential", "the curriculum is an order"
    assert config.data_path.startswith("tiny:train:") and config.eval_data_path.startswith("tiny:validation:")
    assert config.exam


def test_the_exam_marks_right_answers_and_no_others():
    results = run_exam(lambda requests: [""] * len(requests), num_per_kind=3)
    assert all(score["correct"] == 0 for score in results["kinds"].values())
    answers = iter([q.answer for kind in digits.KINDS for q in digits.questions("test", kind, 3, seed=1)])
    results = run_exam(lambda requests: [next(answers) for _ in requests], num_per_kind=3)
    assert all(score["accuracy"] == 1 for score in results["kinds"].values())
    assert results["thinking_gain_points"] == 0
    with pytest.raises(ValueError, match="3 questions were asked, but 1 answers came back"):
        run_exam(lambda requests: [""], num_per_kind=3)


def test_only_what_follows_the_thinking_is_scored():
    question = digits.questions("test", "sum_thinking", 1)[0]
    total = question.answer.rpartition("\n")[2]
    assert is_correct(question, f"<think>\nnonsense\n</think>\n\n{total}") and not is_correct(
        question, "<think>\n" + total
    )


def test_boxes_count_from_half_an_overlap():
    assert parse_box("<box>(0.10,0.20),(0.30,0.40)</box>") == (0.1, 0.2, 0.3, 0.4)
    assert parse_box("at <box>(0.10,0.20),(0.30,0.40)</box>") is None
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0


def test_samples_can_be_written_as_files(tmp_path, tiny):
    path = digits.write_samples(tmp_path / "out", 8)
    dataset = ConversationDataset(path, Ovis2_5Processor.from_pretrained(tiny), **asdict(TINY_LIMITS))
    assert len(dataset) == 8
