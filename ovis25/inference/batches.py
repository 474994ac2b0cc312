"""Which requests share a batch: those that are decoded alike."""

from collections.abc import Sequence

from ovis25.inference.prompt import Prompt


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Indices of the prompts, in batches of equal generation arguments, in order of their first ones.

    A request with a `seed` of its own is a batch: who sits beside it must not change what it draws.
    """
    groups: list[tuple[dict, list[int]]] = []
    for index, prompt in enumerate(prompts):
        own = prompt.request.generation
        size = 1 if own.get("seed") is not None else batch_size
        group = next((indices for known, indices in reversed(groups) if known == own and len(indices) < size), None)
        if group is None:
            group = []
            groups.append((own, group))
        group.append(index)
    return [indices for _, indices in groups]
