"""The tiny model's tokenizer: byte-level BPE in the Qwen2 style, with the released added tokens and chat template.

Bytes and added tokens make it complete; the few merges shorten the tiny task's own kinds. It is written in the
released file layout (`vocab.json`, `merges.txt`, `tokenizer_config.json`, ...), which transformers' Qwen2Tokenizer
reads.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ovis25.constants import ADDED_TOKENS, PAD_TOKEN, TURN_END
from ovis25.data.digits import kinds

CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")

# Words are split as Qwen2 splits them: every digit alone, a word with the sign or blank before it, newlines together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# More merges than the texts below can give: every word of theirs becomes one token.
_MOST_MERGES = 300
TEXTS = (
    "system", "user", "assistant", "\n\n",
    kinds.READING_PROMPT, kinds.SUM_PROMPT, kinds.GROUNDING_PROMPT.format(digit=1), kinds.COMPARISON_PROMPT,
    kinds.ARITHMETIC_PROMPT.format(first=1, second=1), "first", "second",
    kinds.format_box((1, 1, 2, 2), (4, 4)),
)  # fmt: skip


def write_tokenizer(folder: str | Path) -> dict[str, int]:
    """Write the tokenizer's files into an existing folder; returns every token's id.

    The ids: 256 bytes, then merged words, then the added tokens.
    """
    folder = Path(folder)
    vocab, merges = _train()
    added = {token: len(vocab) + number for number, token in enumerate(ADDED_TOKENS)}
    template = CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")
    special = [token for token, is_special in ADDED_TOKENS.items() if is_special]
    roles = {"eos_token": TURN_END, "pad_token": PAD_TOKEN, "additional_special_tokens": special[1:]}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(added[token]): _flags(token) for token in ADDED_TOKENS},
        **roles,
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(folder / "vocab.json", vocab)
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "special_tokens_map.json", roles)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "chat_template.json", {"chat_template": template})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {**vocab, **added}


def _train() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that turn each word of the task's texts into one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _MOST_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _flags(token: str) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token, **flags, "special": ADDED_TOKENS[token]}


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
