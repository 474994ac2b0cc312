"""Which requests share a batch: those that are decoded alike."""

from collections.abc import Sequence

from ovis25.inference.prompt import Question


def batches(prompts: Sequence[Question], batch_size: int) -> list[list[int]]:
    """Indices of the prompts, in batches of equal generation arguments of their own, in order of their first ones."""
    groups: list[tuple[dict, list[int]]] = []
    for index, prompt in enumerate(prompts):
        own = prompt.request.generation
        group = next(
            (indices for known, indices in reversed(groups) if known == own and len(indices) < batch_size), None
        )
        if group is None:
            group = []
            groups.append((own, group))
        group.append(index)
    return [indices for _, indices in groups]
