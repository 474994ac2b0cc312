"""Make tests/golden, the small copy of the golden data that the tests need, from the whole set.

    python tests/make_golden_subset.py ../shared

The folder given holds `golden/` and `tokenizer_9b/`. Kept as they are: the tiny checkpoint, the small images,
the conversations and every tensor except three kinds. Pixels are kept as a digest (the images give them back,
bit for bit), gradients as samples and norms, and of the real images' pixels those of the small images. The
tokenizer keeps the tokens and merges that the texts need, at their own ids.
"""

import argparse
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ovis25 import Ovis2_5Processor

TARGET = Path(__file__).parent / "golden"
IMAGES = ("0.png", "1.png", "2.png", "frame0.png", "frame1.png", "frame2.png", "frame3.png", "real2.png", "real4.png")
LARGE_REAL_IMAGES = ("preprocess_real/0/", "preprocess_real/1/", "preprocess_real/3/")
TEXT_FILES = ("chat_prompts.json", "training_samples.json")
# the 9B's small files, byte for byte; vocab.json and merges.txt are reduced
SIDE_FILES = (
    "added_tokens.json", "chat_template.json", "config.json", "generation_config.json", "preprocessor_config.json",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
# Prompts that tests use beside the golden ones; every other text falls back to single bytes.
MORE_TEXTS = (
    "Find the red apple. Please provide the bounding box coordinates. <ref>red apple</ref> <box>(0.1,0.2),(0.3,0.4)"
    "</box> Please provide the point coordinates. <point>(0.55,0.61)</point>",
    "Describe this image in detail. What do you see? Compare the two images. Describe the video. Write a short story.",
)
SAMPLE_STRIDE = 61
WHOLE_BELOW = 257


def sample_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """The elements of a gradient that the small copy keeps: all of a small one, else every 61st."""
    flat = gradient.flatten()
    return flat if flat.numel() < WHOLE_BELOW else flat[::SAMPLE_STRIDE]


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes: equal digests, equal bits."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def split_gradients(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Per case, `CASE/grad_samples` and float64 `CASE/grad_norms` of all gradients, in the order of the names."""
    names: dict[str, list[str]] = {}
    for key in sorted(tensors):
        case, separator, name = key.partition("/grad/")
        if separator:
            names.setdefault(case, []).append(name)
    reduced = {}
    for case, case_names in names.items():
        gradients = [tensors[f"{case}/grad/{name}"] for name in case_names]
        reduced[f"{case}/grad_samples"] = torch.cat([sample_gradient(gradient) for gradient in gradients])
        reduced[f"{case}/grad_norms"] = torch.stack([gradient.double().norm() for gradient in gradients])
    return reduced, names


def reduce_tensors(source: Path, target: Path) -> None:
    tensors = load_file(source / "tensors.safetensors")
    kept, gradient_names = split_gradients(tensors)
    kept |= {
        key: value
        for key, value in tensors.items()
        if "/grad/" not in key and not key.endswith("pixel_values") and not key.startswith(LARGE_REAL_IMAGES)
    }
    digests = {key: digest(value) for key, value in sorted(tensors.items()) if key.endswith("pixel_values")}
    (target / "tensors.safetensors").write_bytes(save(kept))
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    meta = {key: value for key, value in meta.items() if not f"{key}/".startswith(LARGE_REAL_IMAGES)}
    for name, content in (("meta", meta), ("gradient_names", gradient_names), ("pixel_digests", digests)):
        (target / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def golden_texts(source: Path) -> list[str]:
    texts = []
    for name in TEXT_FILES:
        for sample in json.loads((source / name).read_text(encoding="utf-8")):
            texts.append(sample.get("prompt") or sample["text"])
    budget = json.loads((source / "thinking_budget.json").read_text(encoding="utf-8"))
    return [*texts, budget["early_stop_text"], *(case["prompt"] for case in budget["cases"]), *MORE_TEXTS]


def used_merges(words: set[str], ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding applies to the words."""
    used = set()
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            used.add((parts[place], parts[place + 1]))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return used


def reduce_tokenizer(source: Path, target: Path, texts: list[str]) -> None:
    """Keep single bytes, the added tokens, and what the texts need, at their own ids; check that ids are equal.

    Where all merges that the whole set applies to a word are kept, a subset of the merges applies the same
    ones: the best of all stays the best of fewer.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        shutil.copyfile(source / name, target / name)
    whole = Ovis2_5Processor.from_pretrained(source).tokenizer
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    added = json.loads((source / "added_tokens.json").read_text(encoding="utf-8"))
    # added tokens that stand in no vocabulary file take the next free ids, which a reduced one would shift
    added |= {token.content: index for index, token in whole.added_tokens_decoder.items()}

    # with the placeholders as separators, as our encoding has them, and as plain text
    separators = ["|".join(map(re.escape, tokens)) for tokens in (added, [*added, "<image>", "<video>"])]
    pieces = {piece for pattern in separators for text in texts for piece in re.split(pattern, text) if piece}
    into_words = whole.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for piece in pieces for word, _ in into_words(piece)}
    used = used_merges(words, {pair: rank for rank, pair in enumerate(merges)})
    tokens = {token for token in vocabulary if len(token) == 1} | {first + second for first, second in used}
    reduced = {token: index for token, index in vocabulary.items() if token in tokens} | added
    (target / "vocab.json").write_text(json.dumps(reduced, ensure_ascii=False) + "\n", encoding="utf-8")
    kept = [" ".join(pair) for pair in merges if pair in used]
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *kept]) + "\n", encoding="utf-8")

    small = Ovis2_5Processor.from_pretrained(target).tokenizer
    for text in [*texts, *pieces]:
        expected = whole(text, return_offsets_mapping=True)
        got = small(text, return_offsets_mapping=True)
        assert got["input_ids"] == expected["input_ids"], text
        assert got["offset_mapping"] == expected["offset_mapping"], text
        assert small.decode(got["input_ids"]) == whole.decode(expected["input_ids"]), text
    assert small.get_added_vocab() == whole.get_added_vocab()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that holds golden/ and tokenizer_9b/")
    source = parser.parse_args().source
    golden = source / "golden"
    checkpoint = [f"tiny_checkpoint/{name}" for name in ("config.json", "model.safetensors")]
    for name in [*TEXT_FILES, *checkpoint, *(f"images/{image}" for image in IMAGES)]:
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(golden / name, TARGET / name)
    reduce_tensors(golden, TARGET)
    reduce_tokenizer(source / "tokenizer_9b", TARGET / "tokenizer", golden_texts(golden))
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
