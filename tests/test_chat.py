"""Prompts, ids and labels: equal to the released code's, and built in one pass."""

import numpy as np
import pytest
from make_golden_subset import golden_texts

from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, VIDEO_BEGIN_ID, VISUAL_ATOM_ID
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import count_placeholders, tokenize, training_text

# In the golden prompts a visual is one id of its own.
GOLDEN_PLACEHOLDERS = {IMAGE_BEGIN_ID: -200, VIDEO_BEGIN_ID: -201}


@pytest.fixture(scope="module")
def any_processor(any_golden) -> Ovis2_5Processor:
    return Ovis2_5Processor.from_pretrained(any_golden.tokenizer_folder)


def test_chat_prompts_are_equal(any_golden, any_processor):
    samples = any_golden.json("chat_prompts")
    assert len(samples) == 30
    for sample in samples:
        options = {} if sample["enable_thinking"] is None else {"enable_thinking": sample["enable_thinking"]}
        text = any_processor.apply_chat_template(
            sample["messages"], add_generation_prompt=sample["add_generation_prompt"], **options
        )
        assert text == sample["text"], sample["name"]
        ids, labels = tokenize(any_processor.tokenizer, text, [(1, 2, 2)] * sum(count_placeholders(text)))
        kept = [GOLDEN_PLACEHOLDERS.get(i, i) for i in ids if i >= 0 or i in GOLDEN_PLACEHOLDERS]
        assert kept == sample["ids"], sample["name"]
        assert set(labels) == {IGNORE_INDEX}


def test_training_samples_are_equal(any_golden, any_processor):
    samples = any_golden.json("training_samples")
    assert len(samples) == 8
    for sample in samples:
        rendered = training_text(sample["conversations"])
        assert rendered.text + "\n" == sample["prompt"], sample["name"]
        grids = [tuple(grid) for grid in sample["grid_thws"]]
        ids, labels = tokenize(any_processor.tokenizer, rendered.text, grids, rendered.learned_spans)
        assert ids == sample["input_ids"], sample["name"]
        assert labels == sample["labels"], sample["name"]


def test_the_reduced_tokenizer_gives_the_same_ids(golden, whole_golden):
    small, whole = (
        Ovis2_5Processor.from_pretrained(source.tokenizer_folder).tokenizer for source in (golden, whole_golden)
    )
    for text in golden_texts(whole_golden.folder):
        assert small(text)["input_ids"] == whole(text)["input_ids"]
    assert small.get_added_vocab() == whole.get_added_vocab() and len(small.get_added_vocab()) == 26
    assert (len(whole), small.pad_token_id, small.eos_token_id) == (151669, 151643, 151645)


def encode(processor, conversations, grids=()) -> dict:
    """A training sample whose visuals are blank."""
    pixels = [np.zeros((frames * height * width, 768), dtype=np.float32) for frames, height, width in grids]
    return processor.encode_training(conversations, pixels, list(grids))


def learned_text(processor, conversations, grids=()) -> list[str]:
    """The learned stretches of a conversation, decoded."""
    sample = encode(processor, conversations, grids)
    stretches, previous = [], IGNORE_INDEX
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            stretches = [*stretches, []] if previous == IGNORE_INDEX else stretches
            stretches[-1].append(label)
        previous = label
    return [processor.tokenizer.decode(stretch) for stretch in stretches]


def test_only_answers_are_learned(processor):
    conversations = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2+2?"},
        {"from": "ignored_gpt", "value": "5"},
        {"from": "human", "value": "Again?"},
        {"from": "gpt", "value": "4"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "<think>\nCount.\n</think>\n\nYes."},
    ]
    assert learned_text(processor, conversations) == [
        "4<|im_end|>",
        "<think>\nCount.\n</think>\n\nYes.<|im_end|>",
    ]


def test_an_empty_think_block_is_added_and_not_learned(processor):
    conversations = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A <think> alone"}]
    assert "<think>\n\n</think>\n\nA <think> alone" in training_text(conversations).text
    assert learned_text(processor, conversations) == ["A <think> alone<|im_end|>"]


def test_an_empty_answer_is_learned_as_the_end_of_turn(processor):
    assert learned_text(processor, [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]) == ["<|im_end|>"]


def test_a_visual_in_an_answer_is_never_learned(processor):
    conversations = [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "Here: <image> done"}]
    sample = encode(processor, conversations, [(1, 4, 4)])
    visual = sample["input_ids"] < 0
    assert sample["input_ids"][visual].tolist() == [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * 4, IMAGE_END_ID]
    assert set(sample["labels"][visual].tolist()) == {IGNORE_INDEX}
    assert learned_text(processor, conversations, [(1, 4, 4)]) == ["Here: ", " done<|im_end|>"]


def test_characters_of_several_tokens_are_learned_whole(processor):
    answer = "🙂三本书 é"
    assert learned_text(processor, [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]) == [
        f"{answer}<|im_end|>"
    ]


def test_placeholders_and_visuals_that_differ_in_number_are_refused(processor):
    with pytest.raises(ValueError, match="2 placeholders in the text, but 1 visual inputs"):
        tokenize(processor.tokenizer, "<image> and <image>", [(1, 2, 2)])
    with pytest.raises(ValueError, match="0 placeholders in the text, but 1 visual inputs"):
        tokenize(processor.tokenizer, "no picture", [(1, 2, 2)])


def test_text_is_tokenized_once_per_chunk(processor):
    calls = []

    def counting(chunk, **options):
        calls.append(chunk)
        return processor.tokenizer(chunk, **options)

    rendered = training_text([{"from": "human", "value": "<image>\n<image>\nHi"}, {"from": "gpt", "value": "Ho"}])
    tokenize(counting, rendered.text, [(1, 2, 2)] * 2, rendered.learned_spans)
    assert "".join(calls) == rendered.text.replace("<image>", "")
    assert len(calls) == 3
