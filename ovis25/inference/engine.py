"""Ask a model: one picture, several, a video, or text alone; single or in batches."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ovis25.checkpoint import resolve_checkpoint
from ovis25.constants import THINK_END
from ovis25.model import Ovis2_5
from ovis25.model.adapter import adapter_base, load_adapter
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.image import ImageSource
from ovis25.processing.processor import VideoSource
from ovis25.tiny.build import resolve_model_path


@dataclass
class Request:
    """One question with its visuals: images or one video, or neither."""

    prompt: str
    images: list[ImageSource] = field(default_factory=list)
    video: VideoSource | None = None
    enable_thinking: bool = False

    def message(self) -> dict:
        visuals = [{"type": "image", "image": image} for image in self.images]
        if self.video is not None:
            visuals.append({"type": "video", "video": self.video})
        return {"role": "user", "content": [*visuals, {"type": "text", "text": self.prompt}]}


class Ovis25Inference:
    """A loaded checkpoint that answers.

    Args:
        model_path: a folder (released, or trained here; an adapter's loads its base), a hub name, or `tiny`.
        device: "cuda", "cpu", ...; the GPU where there is one by default.
        torch_dtype: bfloat16 on a GPU that has it and float32 on a CPU by default.
        attn_implementation: the LLM's attention, as in transformers.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
    ):
        folder = resolve_checkpoint(resolve_model_path(model_path), "tokenizer_config.json")
        base = adapter_base(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if torch_dtype is None:
            torch_dtype = torch.float32
            if self.device.type == "cuda":
                torch_dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        arguments = {"attn_implementation": attn_implementation} if attn_implementation else {}
        weights = resolve_checkpoint(resolve_model_path(base)) if base else folder
        self.model = Ovis2_5.from_pretrained(weights, dtype=torch_dtype, **arguments)
        if base:
            load_adapter(self.model, folder)
        self.model.to(self.device).eval()
        self.processor = Ovis2_5Processor.from_pretrained(folder)

    def single_image_inference(
        self,
        image: ImageSource,
        prompt: str,
        enable_thinking: bool = False,
        max_new_tokens: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **generation,
    ) -> str:
        """Answer a question about one image (path, bytes or PIL).

        `min_pixels` and `max_pixels` default to the budget the model was trained with, else to 448^2 and 1792^2.
        Further arguments are transformers' generation arguments; the checkpoint's `generation_config.json` gives
        the defaults. Returns the text after `</think>`.
        """
        request = Request(prompt, [image], enable_thinking=enable_thinking)
        return self.batch_inference(
            [request], max_new_tokens, min_pixels=min_pixels, max_pixels=max_pixels, **generation
        )[0]

    def multi_image_inference(
        self, images: list[ImageSource], prompt: str, enable_thinking: bool = False, max_new_tokens: int = 1024,
        min_pixels: int | None = None, max_pixels: int | None = None, **generation,
    ) -> str:  # fmt: skip
        """Answer a question about several images, shown in the given order before the prompt."""
        request = Request(prompt, list(images), enable_thinking=enable_thinking)
        return self.batch_inference(
            [request], max_new_tokens, min_pixels=min_pixels, max_pixels=max_pixels, **generation
        )[0]

    def video_inference(
        self, video: VideoSource, prompt: str, enable_thinking: bool = False, max_new_tokens: int = 1024,
        min_pixels: int | None = None, max_pixels: int | None = None, **generation,
    ) -> str:  # fmt: skip
        """Answer a question about a video file or a list of frames."""
        request = Request(prompt, video=video, enable_thinking=enable_thinking)
        return self.batch_inference(
            [request], max_new_tokens, min_pixels=min_pixels, max_pixels=max_pixels, **generation
        )[0]

    def text_only_inference(
        self, prompt: str, enable_thinking: bool = False, max_new_tokens: int = 1024, **generation
    ) -> str:
        """Answer a question without visuals."""
        return self.batch_inference([Request(prompt, enable_thinking=enable_thinking)], max_new_tokens, **generation)[0]

    def batch_inference(self, requests: list[Request | dict], max_new_tokens: int = 1024, **arguments) -> list[str]:
        """Answer any mix of requests in one left-padded batch; arguments and order as in `replies`."""
        return [answer_of(reply) for reply in self.replies(requests, max_new_tokens, **arguments)]

    def replies(
        self,
        requests: list[Request | dict],
        max_new_tokens: int = 1024,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **generation,
    ) -> list[str]:
        """The whole replies, thinking included, in the requests' order; a dict is read as the fields of `Request`.

        Raises:
            ValueError: an empty prompt (names the request), or visuals that cannot be read.
        """
        if not requests:
            return []
        requests = [request if isinstance(request, Request) else Request(**request) for request in requests]
        for index, request in enumerate(requests):
            if not request.prompt.strip():
                raise ValueError(f"request {index}: the prompt is empty")
        texts = [
            self.processor.apply_chat_template(
                [request.message()], add_generation_prompt=True, enable_thinking=request.enable_thinking
            )
            for request in requests
        ]
        images, videos = [request.images for request in requests], [request.video for request in requests]
        batch = self.processor(images, texts, videos, min_pixels=min_pixels, max_pixels=max_pixels).to(self.device)
        output = self.model.generate(**batch, max_new_tokens=max_new_tokens, **generation)
        return self.processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_of(reply: str) -> str:
    """The reply without its thinking: what follows `</think>`, or all of it where there is none."""
    return reply.rsplit(THINK_END, 1)[-1].strip()
