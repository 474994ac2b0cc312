"""The checkpoint behind the name `tiny`: Ovis2.5's architecture, small, with random weights; needs no download."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3Config

from ovis25.checkpoint import PROCESSOR_CONFIG_NAME
from ovis25.constants import SIZE_FACTOR, TURN_END
from ovis25.files import follow_umask
from ovis25.model import Ovis2_5, Ovis2_5_Config, SiglipNavitConfig
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.tiny import strips, tokenizer

TINY_NAME = "tiny"
HOME_VARIABLE = "OVIS25_HOME"

# a strip has at most 2 x 2 or 1 x 4 cells of 72 pixels
_MIN_PIXELS, _MAX_PIXELS = SIZE_FACTOR**2, 256 * 256
TINY_LIMITS = VisualLimits(
    single_image_min_pixels=_MIN_PIXELS,
    single_image_max_pixels=_MAX_PIXELS,
    multiple_image_min_pixels=_MIN_PIXELS,
    multiple_image_max_pixels=_MAX_PIXELS,
    video_min_pixels=_MIN_PIXELS,
    video_max_pixels=_MAX_PIXELS,
)

_VIT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 128,
}
_LLM = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
_VISUAL_VOCAB_SIZE = 512
# The released sampling defaults.
_SAMPLING = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def resolve_model_path(name: str | Path) -> str | Path:
    """The checkpoint folder for the name "tiny", built when first asked for; any other name as it is.

    It lies in `$OVIS25_HOME` (`~/.cache/ovis25` by default), under a name that changes with what determines it.
    """
    if str(name) != TINY_NAME:
        return name
    home = Path(os.environ.get(HOME_VARIABLE) or "~/.cache/ovis25").expanduser()
    folder = home / f"{TINY_NAME}-{_fingerprint()}"
    if not folder.is_dir():
        build_tiny(folder)
    return folder


def build_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Write the whole checkpoint folder in the released layout; the same seed gives the same weights.

    It appears complete or not at all: it is written beside its place and renamed. A folder that exists already is
    left alone, so several processes may build at once.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_checkpoint(unfinished, seed)
        follow_umask(unfinished)
        unfinished.rename(folder)
    except OSError:
        # another process was faster
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _fingerprint() -> str:
    """Of the sources that determine the folder: sizes and weights, tokenizer, prompts, template."""
    sources = (Path(__file__), Path(tokenizer.__file__), Path(strips.__file__), tokenizer.CHAT_TEMPLATE_PATH)
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:10]


def _write_checkpoint(folder: Path, seed: int) -> None:
    ids = tokenizer.write_tokenizer(folder)
    config = tiny_config(ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ovis2_5(config)
        initialise(model)
    model.save_pretrained(folder)
    _write_json(folder / "generation_config.json", _generation_config(ids))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(config))
    processor_config = {"processor_class": Ovis2_5Processor.__name__, **asdict(TINY_LIMITS)}
    _write_json(folder / PROCESSOR_CONFIG_NAME, processor_config)


def tiny_config(ids: dict[str, int]) -> Ovis2_5_Config:
    """The architecture, for a tokenizer with these ids."""
    special = {"bos_token_id": ids[tokenizer.PAD_TOKEN], "eos_token_id": ids[TURN_END]}
    return Ovis2_5_Config(
        llm_config=Qwen3Config(vocab_size=len(ids), **_LLM, **special),
        vit_config=SiglipNavitConfig(**_VIT),
        visual_vocab_size=_VISUAL_VOCAB_SIZE,
        dtype="float32",
    )


@torch.no_grad()
def initialise(model: Ovis2_5) -> None:
    """Random weights that suit widths of about 100: matrices that keep variances, instead of a fixed 0.02."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if name != "llm.lm_head":
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    embedding = model.visual_tokenizer.vit.vision_model.embeddings.patch_embedding
    # white paper, whose pixels are all 1, begins at zero
    embedding.bias.copy_(-embedding.weight.flatten(1).sum(1))


def _generation_config(ids: dict[str, int]) -> dict[str, object]:
    pad, end = ids[tokenizer.PAD_TOKEN], ids[TURN_END]
    return {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad, **_SAMPLING}


def _preprocessor_config(config: Ovis2_5_Config) -> dict[str, object]:
    """The released file's keys; Ovis2_5Processor reads none of them."""
    side = config.vit_config.image_size
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": side, "width": side},
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
