"""Who is written now, who waits for a place, and who waits for a tool."""

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait

from ovis25.generate.batch import Batch
from ovis25.generate.sequence import Sequence


class Scheduler:
    """Sequences join at every step, as far as `max_rows` allow, first come, first served.

    A sequence that waits for a tool keeps its place and its cache, as a batch of its own in `parked`.
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self.waiting: deque[Sequence] = deque()
        self.parked: dict[Future, Batch] = {}

    def admit(self, num_running: int) -> list[Sequence]:
        """The waiting sequences that may begin now; one that brings a cache is prefilled alone, so it comes alone."""
        places = self.max_rows - num_running - len(self.parked)
        admitted: list[Sequence] = []
        while self.waiting and len(admitted) < places:
            if self.waiting[0].prompt.cache is not None and admitted:
                break
            admitted.append(self.waiting.popleft())
            if admitted[-1].prompt.cache is not None:
                break
        return admitted

    def returned(self, may_wait: bool) -> list[tuple[Future, Batch]]:
        """The parked batches whose tools have ended; where nothing else can go on, the first of them is waited for."""
        if self.parked and may_wait:
            wait(self.parked, return_when=FIRST_COMPLETED)
        done = [future for future in self.parked if future.done()]
        return [(future, self.parked.pop(future)) for future in done]
