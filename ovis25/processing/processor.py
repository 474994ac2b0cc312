"""The processor: everything between raw samples and the model's tensors, without the model."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from ovis25.checkpoint import (
    PROCESSOR_CONFIG_NAME,
    CheckpointError,
    copy_side_files,
    hub_arguments,
    read_json,
    resolve_checkpoint,
)
from ovis25.constants import SINGLE_IMAGE_PIXELS
from ovis25.processing.chat import count_placeholders, tokenize, training_text
from ovis25.processing.image import ImageSource, open_image, patchify, patchify_bytes
from ovis25.processing.limits import INFERENCE_LIMITS, LIMIT_NAMES, VisualLimits
from ovis25.processing.video import load_video, sample_frames
from ovis25.tokenizer_files import check_tokenizer

VideoSource = str | Path | Sequence[ImageSource]
Budget = tuple[int, int]
Grid = tuple[int, int, int]

# Arguments of other processors, and the values for which they ask for what this one does anyway.
_ANYWAY = {
    "return_tensors": ("pt",),
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "truncation": (False, None),
    "add_special_tokens": (False,),
}


class Ovis2_5Processor(ProcessorMixin):
    """Images, several images, a video, and text to `input_ids`, `attention_mask`, `pixel_values`, `grid_thws`.

    Args:
        tokenizer: the checkpoint's tokenizer.
        chat_template: replaces the tokenizer's.
        limits: pixel budgets and frame numbers of calls that name none. A training run saves its own here, so
            that inference sees pictures as training did; without any, the released inference defaults hold.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, chat_template: str | None = None, limits: VisualLimits = INFERENCE_LIMITS):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.limits = limits
        self.base_folder: Path | None = None
        self._loaded_vocab, self._loaded_template = len(tokenizer), tokenizer.chat_template

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Read a folder or hub name: its tokenizer and, where a training run wrote them, its limits.

        Keyword arguments override single limits (`max_frames=16`). Raises FileNotFoundError as the model does,
        CheckpointError where the tokenizer's files are not whole.
        """
        folder = resolve_checkpoint(pretrained_model_name_or_path, "tokenizer_config.json", **hub_arguments(kwargs))
        check_tokenizer(folder)
        saved = {}
        if (folder / PROCESSOR_CONFIG_NAME).is_file():
            saved = read_json(folder, PROCESSOR_CONFIG_NAME)
        limits = INFERENCE_LIMITS
        for values in (saved, kwargs):
            limits = limits.changed(**{name: value for name, value in values.items() if name in LIMIT_NAMES})
        processor = cls(AutoTokenizer.from_pretrained(folder), limits=limits)
        processor.base_folder = folder
        return processor

    def save_pretrained(self, save_directory, **kwargs):
        """Write the tokenizer (byte for byte as loaded, unless tokens were added) and the limits."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.base_folder and len(self.tokenizer) == self._loaded_vocab:
            copy_side_files(self.base_folder, folder)
            try:
                check_tokenizer(folder)
            except CheckpointError:
                # files that were links out of the folder are not copied
                self.tokenizer.save_pretrained(folder)
        else:
            self.tokenizer.save_pretrained(folder)
        if self.chat_template != self._loaded_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        config = json.dumps(self.to_dict(), indent=2)
        (folder / PROCESSOR_CONFIG_NAME).write_text(config + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, object]:
        """What `processor_config.json` holds."""
        return {"processor_class": type(self).__name__, **asdict(self.limits)}

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Encode one text or a batch of texts that hold `<image>` or `<video>` placeholders.

        Args:
            images: for one text an image or a list; for several texts a list with an entry (image, list or
                None) each. Paths, bytes or PIL.
            videos: likewise; a video is a file or a list of frames.
            min_pixels, max_pixels: replace the limits' budget of the kind at hand.

        Returns:
            `input_ids`, `attention_mask` (B, T), left-padded; with visuals `pixel_values` (N, 768) float32 and
            `grid_thws` (images, 3).
        """
        _warn_of_ignored(kwargs)
        if text is None:
            raise ValueError("text is missing: give the prompt, with <image> or <video> where visuals belong")
        texts = [text] if isinstance(text, str) else list(text)
        images_per_text = _per_text(images, texts, isinstance(text, str))
        videos_per_text = _per_text(videos, texts, isinstance(text, str), keep_lists=True)
        rows, pixels, grids = [], [], []
        for prompt, prompt_images, prompt_video in zip(texts, images_per_text, videos_per_text, strict=True):
            _check_placeholders(prompt, prompt_images, prompt_video)
            prompt_pixels, prompt_grids = self.preprocess(prompt_images, prompt_video, (min_pixels, max_pixels))
            rows.append(tokenize(self.tokenizer, prompt, prompt_grids)[0])
            pixels += prompt_pixels
            grids += prompt_grids
        return BatchFeature({**self.pad_left(rows), **visual_tensors(pixels, grids)})

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, tokenize: bool = False, return_dict: bool = True, **kwargs
    ):
        """Render messages (one conversation or a batch) with the checkpoint's template.

        Content parts are {"type": "text", "text"}, {"type": "image", "image"}, {"type": "video", "video"}; `url` and
        `path` stand for `image` too. `enable_thinking=False` closes the thinking block beforehand; it and the other
        keyword arguments beside the pixel budget go to the tokenizer's method of this name.

        Returns:
            The text; with `tokenize=True` the tensors of a call (or, without `return_dict`, the ids).
        """
        budget = {k: kwargs.pop(k) for k in ("min_pixels", "max_pixels") if k in kwargs}
        is_batch = isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        texts = [
            self.tokenizer.apply_chat_template(
                messages, chat_template=chat_template or self.chat_template, tokenize=False, **kwargs
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts if is_batch else texts[0]
        images = [_visuals(messages, "image") for messages in conversations]
        videos = [_visuals(messages, "video") for messages in conversations]
        for found in videos:
            if len(found) > 1:
                raise ValueError(f"a conversation holds {len(found)} videos; Ovis2.5 takes one")
        batch = self(images, texts, [found[0] if found else None for found in videos], **budget)
        return batch if return_dict else batch["input_ids"]

    def preprocess(
        self,
        images: Sequence[ImageSource] | None,
        video: VideoSource | None,
        budget: tuple[int | None, int | None] = (None, None),
        num_frames: int | None = None,
        raw_pixels: bool = False,
    ) -> tuple[list[np.ndarray], list[Grid]]:
        """Pixels and grids of one sample's visuals: images, or one video. What is None is the limits'.

        Pixels are float32, or with `raw_pixels` uint8, which the model takes as well.
        """
        cut = patchify_bytes if raw_pixels else patchify
        if images and video is not None:
            raise ValueError("one sample takes images or one video, not both")
        if video is not None:
            low, high = self.complete_budget(budget, "video")
            limits = replace(self.limits, min_frames=num_frames, max_frames=num_frames) if num_frames else self.limits
            frames = self.load_frames(video, limits, high)
            pixels, grid = cut(frames, low, high)
            return [pixels], [grid]
        if not images:
            return [], []
        low, high = self.complete_budget(budget, "single_image" if len(images) == 1 else "multiple_image")
        patched = [cut([self.open_image(image, high)], low, high) for image in images]
        return [pixels for pixels, _ in patched], [grid for _, grid in patched]

    def load_frames(
        self, video: VideoSource, limits: VisualLimits | None = None, max_pixels: int | None = None
    ) -> list[Image.Image]:
        """The sampled frames of a video file, or of a list of frames; `max_pixels` as for `open_image`."""
        limits = limits or self.limits
        if isinstance(video, (str, Path)):
            return load_video(video, limits.min_frames, limits.max_frames)
        frames = sample_frames(video, limits.min_frames, limits.max_frames)
        max_pixels = limits.video_max_pixels if max_pixels is None else max_pixels
        return [open_image(frame, limits.max_image_megapixels, max_pixels) for frame in frames]

    def open_image(self, image: ImageSource, max_pixels: int = SINGLE_IMAGE_PIXELS[1]) -> Image.Image:
        """`open_image` of `ovis25.processing.image`, with this processor's `max_image_megapixels`."""
        return open_image(image, self.max_image_megapixels, max_pixels)

    @property
    def max_image_megapixels(self) -> float:
        """The largest picture file that is decoded as it is, in millions of pixels; can be set."""
        return self.limits.max_image_megapixels

    @max_image_megapixels.setter
    def max_image_megapixels(self, value: float) -> None:
        self.limits = self.limits.changed(max_image_megapixels=value)

    def complete_budget(self, budget: tuple[int | None, int | None], kind: str) -> Budget:
        """What is None is the limits'; their minimum follows a lower maximum."""
        (given_low, given_high), (low, high) = budget, self.limits.budget(kind)
        high = high if given_high is None else given_high
        return min(low, high) if given_low is None else given_low, high

    def encode_training(
        self, conversations: list[dict[str, str]], pixels: list[np.ndarray] = (), grids: list[Grid] = ()
    ) -> dict[str, torch.Tensor | None]:
        """One training sample: 1-D int64 `input_ids` and `labels` built in one pass, and its visuals (or None).

        Grids alone, without pixels, give the positions of visuals that are known otherwise.
        """
        rendered = training_text(conversations)
        ids, labels = tokenize(self.tokenizer, rendered.text, list(grids), rendered.learned_spans)
        visuals = visual_tensors(pixels, grids) if len(pixels) else {"pixel_values": None, "grid_thws": None}
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **visuals}

    def pad_left(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T), padded on the left for generation."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "attention_mask": torch.tensor(mask, dtype=torch.int64),
        }

    def decode(self, token_ids, **kwargs) -> str | list[str]:
        """The text of ids (a list of texts for rows of ids); visual markers are passed over."""
        ids = torch.as_tensor(token_ids)
        if ids.dim() > 1:
            return self.batch_decode(ids, **kwargs)
        return self.tokenizer.decode(ids[ids >= 0].tolist(), **kwargs)

    def batch_decode(self, sequences, **kwargs) -> list[str]:
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """What transformers' pipeline calls: texts of rows of ids, visual markers passed over."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", "grid_thws"]


def visual_tensors(pixels: list[np.ndarray], grids: list[Grid]) -> dict[str, torch.Tensor]:
    """`pixel_values` (N, 768) and `grid_thws` (images, 3); nothing where there are no visuals."""
    if not grids:
        return {}
    return {"pixel_values": torch.from_numpy(np.concatenate(pixels)), "grid_thws": torch.tensor(grids)}


def _per_text(visuals, texts: list[str], is_single: bool, keep_lists: bool = False) -> list:
    """One entry per text: a list of images (or one video) or None."""
    if visuals is None:
        return [None] * len(texts)
    if is_single:
        entries = [visuals]
    elif len(visuals) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(visuals)} entries of visuals; give one entry per text")
    else:
        entries = visuals
    if keep_lists:
        return list(entries)
    return [entry if isinstance(entry, (list, tuple)) or entry is None else [entry] for entry in entries]


def _check_placeholders(text: str, images: list | None, video: VideoSource | None) -> None:
    found, given = count_placeholders(text), (len(images or ()), int(video is not None))
    if found != given:
        raise ValueError(
            f"the text holds {found[0]} <image> and {found[1]} <video>, but {given[0]} images and {given[1]} videos "
            "were given; each visual needs its placeholder"
        )


def _warn_of_ignored(kwargs: dict) -> None:
    """transformers' own callers pass some arguments that ask for what is done anyway; others change nothing here."""
    ignored = [f"{name}={value!r}" for name, value in kwargs.items() if value not in _ANYWAY.get(name, ())]
    if ignored:
        warnings.warn(f"Ovis2_5Processor does not use {', '.join(ignored)}", stacklevel=3)


def _visuals(messages: list[dict], kind: str) -> list:
    """The visuals of one kind in a conversation, in order."""
    found = []
    for message in messages:
        if isinstance(message["content"], str):
            continue
        for part in message["content"]:
            if part.get("type") == kind:
                source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
                if source is None:
                    raise ValueError(
                        f'a content part {{"type": "{kind}"}} lacks its "{kind}" (a path, bytes or picture)'
                    )
                found.append(source)
    return found
