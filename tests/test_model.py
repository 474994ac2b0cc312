"""The model's behaviour beyond parity: batches, gradients, loss, attention groups, generation, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, relative_error
from transformers import LogitsProcessor, LogitsProcessorList

from ovis25 import Ovis2_5
from ovis25.constants import IGNORE_INDEX, IMAGE_BEGIN_ID, IMAGE_END_ID, PIXEL_TABLE, VISUAL_ATOM_ID
from ovis25.model.attention import Segments, segment_attention
from ovis25.model.loss import LmHead, next_token_loss
from ovis25.model.ovis import Ovis2_5_Output
from ovis25.model.vision import bicubic_matrix, block_order

# One sample alone against the same sample in a batch, or two orders of the same float32 sums: only rounding differs.
# Measured worst, relative: logits 7e-7, gradients 1e-6.
SAME = 5e-6
PAD = 0


def blank_image_inputs(num_atoms: int = 4) -> dict[str, torch.Tensor]:
    """One 4 x 4 grid of patches (four visual tokens) and a sequence with `num_atoms` visual positions."""
    torch.manual_seed(0)
    ids = [5, IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * num_atoms, IMAGE_END_ID, 7, 8, 9]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(16, 768),
        "grid_thws": torch.tensor([[1, 4, 4]]),
    }


def split_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch as single samples without padding."""
    samples, next_patch, next_grid = [], 0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        sample = {"input_ids": ids[mask][None], "labels": labels[mask][None]}
        num_images = int((ids == IMAGE_BEGIN_ID).sum())
        grids = batch["grid_thws"][next_grid : next_grid + num_images]
        next_grid += num_images
        if num_images:
            num_patches = int(grids.prod(dim=1).sum())
            sample |= {"grid_thws": grids, "pixel_values": batch["pixel_values"][next_patch : next_patch + num_patches]}
            next_patch += num_patches
        samples.append(sample)
    assert next_patch == len(batch["pixel_values"])
    return samples


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    whole = sum(float(value.norm()) ** 2 for value in expected.values()) ** 0.5
    for name, value in expected.items():
        assert float((got[name] - value).norm()) <= SAME * max(float(value.norm()), 1e-4 * whole), name


# -- batches


def test_a_right_padded_batch_equals_its_samples(golden, model):
    batch = golden.inputs("padded_batch")
    logits = model(**batch).logits
    for row, mask, sample in zip(logits, batch["attention_mask"].bool(), split_rows(batch), strict=True):
        assert relative_error(row[mask], model(**sample).logits[0]) < SAME


def prompts(golden) -> list[dict]:
    """The rows of the golden batch without labels: the first and last have images."""
    return [
        {name: value for name, value in sample.items() if name != "labels"}
        for sample in split_rows(golden.inputs("padded_batch"))
    ]


def left_padded(samples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    rows = [F.pad(sample["input_ids"][0], (longest - sample["input_ids"].shape[1], 0), value=PAD) for sample in samples]
    masks = [
        F.pad(torch.ones_like(sample["input_ids"][0]), (longest - sample["input_ids"].shape[1], 0))
        for sample in samples
    ]
    visuals = [sample for sample in samples if "grid_thws" in sample]
    batch = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    if visuals:
        batch |= {name: torch.cat([sample[name] for sample in visuals]) for name in ("pixel_values", "grid_thws")}
    return batch


@pytest.mark.parametrize("kind", ["all have images", "some have images", "text"])
def test_left_padded_generation_equals_single_runs(golden, model, kind):
    samples = prompts(golden)
    text = {"input_ids": golden.inputs("text_only")["input_ids"][:, :11]}
    samples = {
        "all have images": [sample for sample in samples if "grid_thws" in sample],
        "some have images": [*samples, text],
        "text": [text, {"input_ids": text["input_ids"][:, 4:]}],
    }[kind]
    assert len(samples) > 1
    batch = left_padded(samples)
    outputs = model.generate(**batch, do_sample=False, max_new_tokens=12)
    for row, sample in zip(outputs, samples, strict=True):
        alone = model.generate(**sample, do_sample=False, max_new_tokens=12)
        assert row[-12:].equal(alone[0, -12:])
    assert outputs[:, : batch["input_ids"].shape[1]].equal(batch["input_ids"])


def test_position_ids_of_a_packed_row_are_used(golden, model):
    """Two texts in one row, told apart by positions that start anew: transformers builds the block mask."""
    first, second = golden.inputs("text_only")["input_ids"].split([18, 12], dim=1)
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    assert relative_error(packed[:, :18], model(input_ids=first).logits) < SAME
    assert relative_error(packed[:, 18:], model(input_ids=second).logits) < SAME


# -- training


def test_a_batch_without_visuals_gives_every_parameter_a_gradient(golden, model):
    model.train()
    model(**golden.inputs("text_only")).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if not name.startswith("llm."):
                assert not parameter.grad.any(), name
        else:
            assert "post_layernorm" in name
    assert any(value.any() for name, value in gradients(model).items() if name.startswith("llm."))


@pytest.mark.parametrize("case", ["text_only", "single_image"])
def test_a_batch_without_any_learned_token_gives_zero(golden, model, case):
    inputs = golden.inputs(case)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    model.train()
    outputs = model(**inputs)
    assert float(outputs.loss.detach()) == 0.0
    outputs.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(value.isfinite().all() and not value.any() for value in gradients(model).values())


@pytest.mark.parametrize("case", ["multi_image", "padded_batch", "text_only"])
def test_gradient_checkpointing_of_both_towers_changes_no_gradient(golden, model, case):
    inputs = golden.inputs(case)
    model.train()
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.llm.model.layers[0].gradient_checkpointing
    assert model.visual_tokenizer.vit.vision_model.encoder.layers[0].gradient_checkpointing
    runs = []
    layers = (model.llm.model.layers[1], model.visual_tokenizer.vit.vision_model.encoder.layers[1])
    # before, not after: the recomputation stops as soon as it has what the gradient needs
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    model(**inputs).loss.backward()
    assert sorted(runs) == [0, 0, 1, 1], "each layer runs twice: forward, and again for its gradient"
    got = gradients(model)
    assert set(got) == set(expected) and all(got[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("tower", ["vision", "llm"])
def test_gradient_checkpointing_of_one_tower(model, tower):
    model.checkpointed_towers = (tower,)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = {"vision": model.visual_tokenizer.vit.vision_model.encoder.layers, "llm": model.llm.model.layers}
    for name, its_layers in layers.items():
        assert {layer.gradient_checkpointing for layer in its_layers} == {name == tower}


def test_the_mean_over_a_steps_tokens_equals_the_big_batch(golden, model):
    batch = golden.inputs("padded_batch")
    batch["labels"][0, (batch["labels"][0] != IGNORE_INDEX).nonzero()[:5]] = IGNORE_INDEX
    model.train()
    model(**batch).loss.backward()
    expected = gradients(model)
    samples = split_rows(batch)
    counts = [int((sample["labels"][:, 1:] != IGNORE_INDEX).sum()) for sample in samples]
    assert len(set(counts)) > 1, "a mean of means would be the same otherwise"
    model.zero_grad()
    for sample in samples:
        model(**sample, num_items_in_batch=torch.tensor(sum(counts))).loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_training_computes_logits_only_where_asked(golden, model):
    inputs = golden.inputs("text_only")
    model.train()
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits.shape == (1, 30, 512)
    model.eval()
    assert model(**inputs).logits.shape == (1, 30, 512)
    assert model(**inputs, logits_to_keep=1).logits.shape == (1, 1, 512)
    assert model(**inputs, skip_logits=True).logits is None


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_torchs(label_smoothing):
    torch.manual_seed(0)
    hidden, lm_head = torch.randn(2, 7, 8), LmHead(8, 11, bias=False)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :4] = IGNORE_INDEX
    expected = F.cross_entropy(
        lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=label_smoothing
    )
    got, _ = next_token_loss(hidden, labels, lm_head, label_smoothing=label_smoothing)
    assert math.isclose(float(got.detach()), float(expected.detach()), rel_tol=SAME)


def test_label_smoothing_reaches_the_loss(golden, model):
    inputs = golden.inputs("text_only")
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits[0, :-1], inputs["labels"][0, 1:], label_smoothing=0.2)
    assert relative_error(model(**inputs, label_smoothing=0.2).loss, expected.detach()) < SAME


def test_chunks_change_nothing(golden, model, monkeypatch):
    """Loss and visual head in chunks, computed again in the backward pass, against all rows at once."""
    inputs = golden.inputs("multi_image")
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "with_token_metrics": True}
    model.train()
    for head, visual in ((10**6, 10**6), (3, 5)):
        monkeypatch.setattr("ovis25.model.loss.CHUNK_ROWS", head)
        monkeypatch.setattr("ovis25.model.visual_tokenizer.CHUNK_TOKENS", visual)
        model.zero_grad()
        output = model(**inputs, **options)
        output.loss.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        if head == 10**6:
            expected, expected_gradients = output, gradients
    assert relative_error(output.loss, expected.loss) < SAME
    assert relative_error(output.token_metrics, expected.token_metrics) < SAME
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("memory", [8 * 10**9, 10**6, 4 * 10**5, 1])
def test_the_chunks_of_a_small_card_change_nothing(golden, model, memory):
    """As `test_chunks_change_nothing`, with the numbers of rows that a card of so many bytes would give."""
    inputs, found = golden.inputs("single_image"), []
    model.train()
    for planned in (None, memory):
        model.llm.lm_head.planned_memory = model.visual_tokenizer.head.planned_memory = planned
        model.zero_grad()
        loss = model(**inputs, label_smoothing=0.1).loss
        loss.backward()
        found.append((loss.detach(), {n: v.grad.clone() for n, v in model.named_parameters() if v.grad is not None}))
    (expected, expected_gradients), (got, gradients) = found
    assert relative_error(got, expected) < SAME
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


def test_z_loss_is_added(golden, model):
    inputs = golden.inputs("text_only")
    logits = model(**inputs).logits[0, :-1]
    learned = inputs["labels"][0, 1:] != IGNORE_INDEX
    plain, with_z = (float(model(**inputs, z_loss=z).loss.detach()) for z in (0.0, 0.01))
    expected = float(0.01 * (logits[learned].logsumexp(-1) ** 2).mean().detach())
    assert math.isclose(with_z - plain, expected, rel_tol=1e-4)


def test_bytes_are_the_released_pixels(golden, model):
    inputs = golden.inputs("single_image")
    table = torch.from_numpy(PIXEL_TABLE)
    pixels = torch.searchsorted(table, inputs["pixel_values"].contiguous()).to(torch.uint8)
    assert torch.equal(table[pixels.int()], inputs["pixel_values"])
    assert torch.equal(
        model.get_visual_embeddings(pixels, inputs["grid_thws"]),
        model.get_visual_embeddings(inputs["pixel_values"], inputs["grid_thws"]),
    )


# -- packed rows


def packed(golden, cases: list[str]) -> dict[str, torch.Tensor]:
    """Golden samples in one row."""
    samples = [golden.inputs(case) for case in cases]
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    visual = [sample for sample in samples if "pixel_values" in sample]
    return {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples], dim=1),
        "labels": torch.cat([sample["labels"] for sample in samples], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": torch.tensor(lengths),
        **{name: torch.cat([sample[name] for sample in visual]) for name in ("pixel_values", "grid_thws")},
    }


def test_a_packed_row_is_its_samples(golden, model):
    cases = ["text_only", "single_image", "multi_image", "video", "text_only"]
    row = packed(golden, cases)
    assert (torch.cat([golden.inputs(case)["labels"][0, :1] for case in cases]) == IGNORE_INDEX).all()
    alone = [model(**golden.inputs(case)) for case in cases]
    logits = model(**row).logits
    assert relative_error(logits[0], torch.cat([output.logits[0] for output in alone]).detach()) < SAME
    model.train()
    model(**row, num_items_in_batch=7).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    for case in cases:
        model(**golden.inputs(case), num_items_in_batch=7).loss.backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            assert relative_error(gradients[name], value.grad) < 1e-5, name
    # positions are made where they are not given, and the model answers as before
    model.eval()
    del row["position_ids"]
    assert torch.equal(model(**row).logits, logits)
    for case, output in zip(cases, alone, strict=True):
        assert torch.equal(model(**golden.inputs(case)).logits, output.logits)


@pytest.mark.slow
def test_compiled_layers_change_nothing(golden, model):
    """Through AOTAutograd, which is what inductor gets; inductor itself is a matter of benchmarks."""
    rows = [golden.inputs("padded_batch"), packed(golden, ["text_only", "multi_image"])]
    plain = Ovis2_5.from_pretrained(GOLDEN / "tiny_checkpoint", dtype=torch.float32).train()
    model.train().compile_layers(backend="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for row in rows:
        losses = [either(**row).loss for either in (model, plain)]
        assert relative_error(losses[0], losses[1].detach()) < SAME
        for loss in losses:
            loss.backward()
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert relative_error(value.grad, other.grad) < 1e-5, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_lengths": torch.tensor([3, 4])}, "describe one row of 7 positions, but the batch is"),
        ({"attention_mask": torch.ones(1, 9)}, "neither attention_mask"),
    ],
)
def test_what_a_packed_row_cannot_have(golden, model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**packed(golden, ["text_only", "single_image"]), **change})


def test_packed_rows_need_sdpa(golden, model):
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation to be sdpa, not eager"):
        model(**packed(golden, ["text_only", "single_image"]))


def test_known_visual_embeddings_stand_for_pixels(golden, model):
    inputs = golden.inputs("multi_image")
    expected = model(**inputs).loss
    pixels, grids = inputs.pop("pixel_values"), inputs.pop("grid_thws")
    embeds = model.get_visual_embeddings(pixels, grids).detach()
    assert torch.equal(model(**inputs, visual_embeds=embeds).loss, expected)
    with pytest.raises(ValueError, match="visual positions, but the visual inputs give"):
        model(**inputs, visual_embeds=embeds[1:])
    # a batch of text beside it computes no visuals, not even a dummy
    model.train()
    model(**golden.inputs("text_only"), visual_embeds=embeds[:0]).loss.backward()
    assert all(value.grad is None for value in model.visual_tokenizer.parameters())


# -- vision


def dense_attention(query, key, value, lengths: list[int], is_causal: bool) -> torch.Tensor:
    """The plain twin: one softmax over all rows, with other segments (and later rows) masked out."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qac,kac->aqk", query, key) * query.shape[-1] ** -0.5
    hidden = segment[:, None] != segment[None, :]
    if is_causal:
        hidden |= torch.ones_like(hidden).triu(1)
    return torch.einsum("aqk,kac->qac", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), value)


@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [[6], [4, 4, 4], [4, 8, 4], [2, 3, 5, 3, 2], [8, 1]])
def test_attention_in_segments_equals_a_dense_mask(lengths, is_causal, num_key_heads):
    torch.manual_seed(0)
    tensors = [torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, num_key_heads, num_key_heads)]
    segments = Segments(lengths, torch.device("cpu"))
    assert segments.offsets.tolist() == [sum(lengths[:k]) for k in range(len(lengths) + 1)]
    assert sum(number * length for number, length in segments.runs) == sum(lengths)
    got, expected = segment_attention(*tensors, segments, is_causal), dense_attention(*tensors, lengths, is_causal)
    assert relative_error(got, expected.detach()) < SAME
    weight = torch.randn_like(got)
    got_gradients = torch.autograd.grad((got * weight).sum(), tensors)
    for got_gradient, gradient in zip(
        got_gradients, torch.autograd.grad((expected * weight).sum(), tensors), strict=True
    ):
        assert relative_error(got_gradient, gradient) < SAME


def test_frames_and_images_do_not_see_each_other(model):
    """Vision of several inputs at once, of equal and of different sizes, is that of each alone."""
    torch.manual_seed(0)
    grids = [(2, 4, 4), (1, 2, 6), (1, 4, 4)]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 768)
    together = model.visual_tokenizer(pixels, grids)
    alone = [(pixels[:16], (1, 4, 4)), (pixels[16:32], (1, 4, 4)), (pixels[32:44], (1, 2, 6)), (pixels[44:], (1, 4, 4))]
    expected = torch.cat([model.visual_tokenizer(rows, [grid]) for rows, grid in alone])
    assert relative_error(together, expected.detach()) < SAME


@pytest.mark.parametrize("size", [2, 14, 32, 56, 112])
def test_bicubic_matrices_interpolate_as_torch(size):
    torch.manual_seed(0)
    table = torch.randn(1, 5, 32, 32, dtype=torch.float64)
    expected = F.interpolate(table, (size, 20), mode="bicubic", align_corners=False)
    rows, columns = (torch.from_numpy(bicubic_matrix(length, 32)).double() for length in (size, 20))
    assert relative_error(rows @ table @ columns.T, expected) < 1e-6
    assert torch.equal(torch.from_numpy(bicubic_matrix(32, 32)), torch.eye(32))


def test_block_order_runs_block_by_block():
    assert block_order(torch.arange(8).reshape(2, 4), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


# -- generation


def test_generate_returns_prompt_and_new_tokens(golden, model):
    inputs = golden.inputs("single_image")
    prompt = inputs["input_ids"][:, :20]
    visuals = {name: inputs[name] for name in ("pixel_values", "grid_thws")}
    output = model.generate(input_ids=prompt, **visuals, do_sample=False, max_new_tokens=5)
    assert output.shape == (1, 25) and output[:, :20].equal(prompt)
    detailed = model.generate(
        input_ids=prompt, **visuals, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    assert detailed.sequences.equal(output) and len(detailed.logits) == 5


def test_greedy_generation_equals_repeated_forwards(golden, model):
    """The cache changes nothing: each token is the best of a forward over everything before it."""
    inputs = golden.inputs("single_image")
    ids = inputs["input_ids"][:, :20]
    visuals = {name: inputs[name] for name in ("pixel_values", "grid_thws")}
    output = model.generate(input_ids=ids, **visuals, do_sample=False, max_new_tokens=6)
    for _ in range(6):
        best = model(input_ids=ids, **visuals).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert output.equal(ids)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
)
def test_beams_and_several_answers(golden, model, options):
    torch.manual_seed(0)
    batch = left_padded(prompts(golden))
    output = model.generate(**batch, max_new_tokens=4, **{"do_sample": False, **options})
    repeats = options.get("num_return_sequences", 1)
    given = batch["input_ids"].repeat_interleave(repeats, dim=0)
    assert output[:, : given.shape[1]].equal(given) and output.shape[1] == given.shape[1] + 4
    assert (output[:, given.shape[1] :] >= 0).all()


class Recorder(LogitsProcessor):
    """Notes how many tokens the logits processors are shown at each step."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


def test_the_prompt_counts_for_no_logits_processor(golden, model):
    """As in the released code: a repetition penalty punishes new tokens only."""
    recorder = Recorder()
    prompt = golden.inputs("text_only")["input_ids"][:, :12]
    model.generate(
        input_ids=prompt, do_sample=False, max_new_tokens=3, logits_processor=LogitsProcessorList([recorder])
    )
    assert recorder.lengths == [0, 1, 2]


def test_generate_while_training_leaves_the_mode(golden, model):
    model.train()
    model.generate(input_ids=golden.inputs("text_only")["input_ids"][:, :5], do_sample=False, max_new_tokens=2)
    assert model.training


# -- errors and small promises


@pytest.mark.parametrize("num_atoms", [3, 5, 0])
def test_visual_positions_and_embeddings_that_disagree_raise(model, num_atoms):
    with pytest.raises(ValueError, match=f"{num_atoms} visual positions.*4 embeddings"):
        model(**blank_image_inputs(num_atoms))
    with pytest.raises(ValueError, match=f"{num_atoms} visual positions.*4 embeddings"):
        model.generate(**blank_image_inputs(num_atoms), max_new_tokens=1)


def test_positions_without_pixels_raise(model):
    with pytest.raises(ValueError, match="4 visual positions.*0 visual embeddings"):
        model(input_ids=blank_image_inputs()["input_ids"])


def test_pixels_and_grids_that_disagree_raise(model):
    inputs = blank_image_inputs()
    with pytest.raises(ValueError, match="describe 16 patches.*12 rows"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:12]})


@pytest.mark.parametrize("bad_id", [-1, -100, -299, -305, -200])
def test_unknown_negative_ids_raise(model, bad_id):
    with pytest.raises(ValueError, match=rf"mark nothing: \[{bad_id}\]"):
        model(input_ids=torch.tensor([[1, 2, bad_id]]))


def test_nothing_to_generate_from_raises(model):
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(max_new_tokens=1)


def test_outputs_and_embeddings(golden, model):
    inputs = golden.inputs("single_image")
    outputs = model(**inputs, output_hidden_states=True)
    assert isinstance(outputs, Ovis2_5_Output) and len(outputs.hidden_states) == 4
    assert outputs.past_key_values.get_seq_length() == 33
    embeds = model.get_inputs_embeds(inputs["input_ids"], inputs["pixel_values"], inputs["grid_thws"])
    assert model(inputs_embeds=embeds).logits.equal(outputs.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_integer_and_boolean_masks_mean_the_same(golden, model, side):
    batch = golden.inputs("padded_batch")
    if side == "left":
        batch = left_padded(prompts(golden))
    mask = batch.pop("attention_mask")
    real = mask.bool()
    logits = [model(**batch, attention_mask=m).logits[real] for m in (mask.long(), real)]
    assert logits[0].equal(logits[1])


def test_a_model_from_scratch_is_finite_and_trains(golden):
    config = Ovis2_5.from_pretrained(GOLDEN / "tiny_checkpoint").config
    torch.manual_seed(0)
    model = Ovis2_5(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**golden.inputs("single_image")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert math.isclose(losses[0], math.log(512), rel_tol=0.05), "a fresh model knows nothing"
    assert losses[-1] < losses[0] / 2
