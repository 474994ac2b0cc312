"""The exam at the end of a run on the embedded model's data."""

from collections.abc import Iterable

from ovis25.data.digits import KINDS
from ovis25.evaluate.digits import print_exam, run_exam
from ovis25.inference import Ovis25Inference
from ovis25.tools import toolbox

_EXAM_BATCH = 64


def hold_exam(model_path: str, kinds: Iterable[str] = tuple(KINDS)) -> dict:
    """Let a tiny model answer held-out questions and print how it did."""
    engine = Ovis25Inference(model_path)

    def answer(requests: list[dict]) -> list[str]:
        replies = []
        for start in range(0, len(requests), _EXAM_BATCH):
            batch = requests[start : start + _EXAM_BATCH]
            limit = max(request["max_new_tokens"] for request in batch)
            fields = [{k: r[k] for k in ("prompt", "images", "enable_thinking")} for r in batch]
            for request, question in zip(fields, batch, strict=True):
                request["tools"] = toolbox() if question["with_tools"] else None
            greedy = {"do_sample": False, "repetition_penalty": 1.0}
            found = engine.replies(fields, len(batch), max_new_tokens=limit, **greedy)
            replies += [reply.text for reply in found]
        return replies

    results = run_exam(answer, asked_kinds=kinds)
    print_exam(results)
    print(f"The checkpoint lies in {model_path}")
    return results
