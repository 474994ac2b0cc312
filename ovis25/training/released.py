"""What a dry run knows of a released model that cannot be fetched: its shapes exactly, the length of texts about.

The stand-in tokenizer splits text as the released one does before it merges, and then long runs of letters: Latin
ones after 10, Chinese and Japanese ones after 2, Korean ones after each, others after 3. Against the released
tokenizer that gives 0.9 to 1.06 times the tokens of English, French, Chinese, Russian and code, 0.7 of German and
Korean.
"""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ovis25.checkpoint import resolve_checkpoint
from ovis25.model.folder import check_folder
from ovis25.processing import Ovis2_5Processor
from ovis25.tiny.build import resolve_model_path
from ovis25.tiny.tokenizer import ADDED_TOKENS, PAD_TOKEN
from ovis25.training.memory import released_config

RELEASED = {"AIDC-AI/Ovis2.5-2B": "2B", "AIDC-AI/Ovis2.5-9B": "9B"}
ESTIMATE_NOTE = (
    "text token counts are estimates, because the tokenizer of {name} could not be fetched (visual tokens are exact); "
    "the real run needs the hub or a downloaded folder"
)

# weights are what a dry run does without
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth"]
_UNKNOWN = "<unk>"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[\p{Han}\p{Hiragana}\p{Katakana}]{1,2}|\p{Hangul}"
    r"|[^\r\n\p{L}\p{N}]?[a-zA-Z]{1,10}|[^\r\n\p{L}\p{N}]?\p{L}{1,3}"
    r"|\p{N}| ?[^\s\p{L}\p{N}]{1,3}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class Base:
    """The model that a run starts from: its folder and processor; `note` where texts can only be estimated."""

    folder: Path
    processor: Ovis2_5Processor
    note: str | None = None


def find_base(name: str, dry_run: bool = False) -> Base:
    """A folder, a hub name or tiny; a dry run fetches no weights, and needs no hub for a released name.

    Raises:
        FileNotFoundError: as `resolve_checkpoint`.
    """
    place = resolve_model_path(name)
    only = {"ignore_patterns": _WEIGHTS} if dry_run else {}
    try:
        folder = resolve_checkpoint(place, **only)
    except FileNotFoundError:
        if not dry_run or name not in RELEASED:
            raise
        return Base(_shapes_folder(name), Ovis2_5Processor(stand_in_tokenizer()), ESTIMATE_NOTE.format(name=name))
    # a dry run has left the weights at the hub
    check_folder(folder, with_weights=not dry_run or Path(place).is_dir())
    return Base(folder, Ovis2_5Processor.from_pretrained(folder))


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Counts about as many tokens as the released tokenizer, with its added tokens; its ids mean nothing."""
    tokenizer = Tokenizer(models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD_TOKEN, unk_token=_UNKNOWN)


def _shapes_folder(name: str) -> Path:
    """A folder with the released `config.json` alone, gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix="ovis25-shapes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    released_config(RELEASED[name]).save_pretrained(folder)
    return folder
