"""What is known of a data set before a pixel is decoded: made once from rows, processor and limits; can be kept.

A survey is data alone: numbers, and defects with their kinds. `survey_text` puts it into words, and what to do about
the defects is decided by who takes it (`dataset`).
"""

import json
import uuid
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ovis25.data.errors import DataError, DefectKind, SampleError
from ovis25.data.measure import Budget, Measure, Rules, measure
from ovis25.data.samples import Defect, Samples
from ovis25.data.schema import Sample

# what is known of a sample beforehand; see `measure.Measure`
SIZES = np.dtype([("tokens", np.int32), ("learned", np.int32), ("visual", np.int32), ("patch_pairs", np.int64)])
# as many defects does a message list, so for as many the file that was meant is looked for
MAX_LISTED = 20
_SPOT_CHECK = 256
# of the saved files
_FORMAT = 1


@dataclass
class Statistics:
    """Counts over the samples that are used; `is_estimate` where they come from a spot check.

    `num_empty_thinking`: answers with an explicit empty `<think>` block; `num_placed`: visuals that no text names, put
    before the first question; `unused_keys`: keys of rows and turns that nothing reads, and how many samples have them.
    """

    num_samples: int
    num_skipped: int
    num_shrunk: int
    total_tokens: int
    learned_tokens: int
    visual_tokens: int
    longest: int
    is_estimate: bool
    kinds: dict[str, int] = field(default_factory=dict)
    num_empty_thinking: int = 0
    num_placed: int = 0
    unused_keys: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Survey:
    """What a check of rows found.

    Args:
        source: how messages call the set.
        num_rows: of the whole set.
        checked: the rows that were looked at: all, about 256 of rows made on demand, or none.
        settings: limits, tools and tokenizer that it was made with; a survey serves no other ones.
        is_whole: False where it ended at rows that are malformed; nothing was measured then.
        sizes: (checked rows without a defect,) of dtype SIZES, in the order of rows.
        shrunk: row -> the lower pixel budget that it needs to keep its length limit.
        defects: in the order of rows.
        kinds: kind of sample -> how many of the measured ones.
        num_empty_thinking, num_placed, unused_keys: as in `Statistics`, of the measured ones.
    """

    source: str
    num_rows: int
    checked: range = range(0)
    settings: dict = field(default_factory=dict)
    is_whole: bool = True
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, SIZES))
    shrunk: dict[int, Budget] = field(default_factory=dict)
    defects: tuple[Defect, ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)
    num_empty_thinking: int = 0
    num_placed: int = 0
    unused_keys: dict[str, int] = field(default_factory=dict)

    @cached_property
    def kept(self) -> np.ndarray:
        """(samples,) the rows without a defect, in order."""
        return np.setdiff1d(np.arange(self.num_rows), [defect.index for defect in self.defects])

    def by_kind(self) -> dict[DefectKind, list[Defect]]:
        """The defects of each kind that there is, the most frequent kind first."""
        grouped: dict[DefectKind, list[Defect]] = {}
        for defect in self.defects:
            grouped.setdefault(defect.kind, []).append(defect)
        return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))

    def statistics(self) -> Statistics:
        """Counts for the plan; extrapolated from the spot check for rows made on demand."""
        share = len(self.kept) / max(len(self.sizes), 1)
        totals = {name: round(int(self.sizes[name].sum(dtype=np.int64)) * share) for name in SIZES.names}
        return Statistics(
            num_samples=len(self.kept),
            num_skipped=len(self.defects),
            num_shrunk=round(len(self.shrunk) * share),
            total_tokens=totals["tokens"],
            learned_tokens=totals["learned"],
            visual_tokens=totals["visual"],
            longest=int(self.sizes["tokens"].max(initial=0)),
            is_estimate=len(self.sizes) != len(self.kept),
            kinds={kind: round(count * share) for kind, count in self.kinds.items()},
            num_empty_thinking=round(self.num_empty_thinking * share),
            num_placed=round(self.num_placed * share),
            unused_keys={key: round(count * share) for key, count in self.unused_keys.items()},
        )

    def check_fits(self, samples: Samples, rules: Rules) -> None:
        """Refuse other rows or settings than it was made of. The rows' content is not compared.

        Raises:
            DataError: names what differs, with both values.
        """
        pairs = {"number of rows": (self.num_rows, len(samples))}
        now = settings_of(rules)
        pairs |= {name: (self.settings.get(name), value) for name, value in now.items()} if self.settings else {}
        for name, (before, value) in pairs.items():
            if before != value:
                raise DataError(f"the survey of {self.source} has {name} {before}, now it is {value}; make it anew")

    def save(self, path: str | Path) -> None:
        """Write PATH (JSON) and, beside it, the numbers of the samples as PATH with the ending .npz."""
        path = Path(path)
        content = {name: getattr(self, name) for name in _IN_JSON}
        content |= {"format": _FORMAT, "defects": [asdict(defect) for defect in self.defects]}
        content["checked"] = [self.checked.start, self.checked.stop, self.checked.step]
        rows = np.array(list(self.shrunk), dtype=np.int64)
        budgets = np.array(list(self.shrunk.values()), dtype=np.int64).reshape(-1, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, sizes=self.sizes, shrunk_rows=rows, shrunk_budgets=budgets)
        temporary.replace(path.with_suffix(".npz"))
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Survey":
        """What `save` wrote.

        Raises:
            DataError: a file is missing, broken or of another version.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("another version wrote it")
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as numbers:
                sizes, rows, budgets = (numbers[name] for name in ("sizes", "shrunk_rows", "shrunk_budgets"))
            content["checked"] = range(*content["checked"])
            content["defects"] = tuple(Defect(**{**d, "kind": DefectKind(d["kind"])}) for d in content["defects"])
            shrunk = {int(row): tuple(map(int, budget)) for row, budget in zip(rows, budgets, strict=True)}
            return cls(**content, sizes=sizes.astype(SIZES, casting="no"), shrunk=shrunk)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the survey {path} cannot be read: {reason}; make it anew") from error


_IN_JSON = ("source", "num_rows", "settings", "is_whole", "kinds", "num_empty_thinking", "num_placed", "unused_keys")


def settings_of(rules: Rules) -> dict:
    """What of the rules decides what a survey finds, as JSON has it."""
    tokenizer = {"vocabulary": len(rules.processor.tokenizer)}
    return {**asdict(rules.limits), **asdict(rules.lengths), **tokenizer, "tools": list(rules.tools.tools)}


def make_survey(
    samples: Samples,
    rules: Rules,
    *,
    stops_at_form: bool = False,
    measure_all: bool = True,
    show_progress: bool = False,
) -> Survey:
    """Look at every sample: its form, its files, its pictures' headers, its length.

    Args:
        samples, rules: the rows, and what they are encoded with.
        stops_at_form: look at the form and the files of all rows first, which is quick, and end there if any has a
            defect; rows made on demand are made once, so for them there is no first look.
        measure_all: False takes about 256 rows, evenly spread, of rows made on demand; a list is looked at whole.
        show_progress: a bar on standard error, if that is a terminal.
    """
    is_spot_check = samples.is_generated and not measure_all
    step = max(1, len(samples) // _SPOT_CHECK) if is_spot_check else 1
    rows = range(0, len(samples), step)
    tally = _Tally(samples, rules, np.zeros(len(rows), SIZES))
    if stops_at_form and not samples.is_generated:
        for row_index in rows:
            tally.read(row_index)
        if tally.defects:
            return tally.survey(rows, is_whole=False)
    console = Console(stderr=True)
    is_hidden = not (show_progress and console.is_terminal) or len(rows) < _SPOT_CHECK
    for row_index in track(rows, f"checking {Path(samples.source).name}", console=console, disable=is_hidden):
        tally.add(row_index)
    return tally.survey(rows, is_whole=True)


@dataclass
class _Tally:
    """A survey while it is made, row after row."""

    samples: Samples
    rules: Rules
    sizes: np.ndarray
    num_measured: int = 0
    num_unread: int = 0
    shrunk: dict[int, Budget] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    unused_keys: Counter = field(default_factory=Counter)
    num_empty_thinking: int = 0
    num_placed: int = 0

    def read(self, row_index: int) -> Sample | None:
        """The row as a sample; None, and a defect, where it cannot be one."""
        # looking for neighbours reads folders: only where the message is shown
        suggest = self.samples.is_generated or self.num_unread < MAX_LISTED
        try:
            return self.samples.read(row_index, suggest)
        except SampleError as error:
            self.num_unread += 1
            self.defects.append(self.samples.defect(row_index, error))
            return None

    def add(self, row_index: int) -> None:
        """Read and measure one row."""
        sample = self.read(row_index)
        if sample is None:
            return
        try:
            found = measure(sample, self.rules)
        except SampleError as error:
            self.defects.append(self.samples.defect(row_index, error))
            return
        self._count(row_index, sample, found)

    def _count(self, row_index: int, sample: Sample, found: Measure) -> None:
        self.sizes[self.num_measured] = found.num_tokens, found.num_learned, found.num_visual, found.num_patch_pairs
        self.num_measured += 1
        self.kinds[sample.kind] += 1
        self.unused_keys.update(sample.unused_keys)
        self.num_empty_thinking += sample.num_empty_thinking
        self.num_placed += sample.num_placed
        if found.is_shrunk:
            self.shrunk[row_index] = found.budget

    def survey(self, rows: range, is_whole: bool) -> Survey:
        return Survey(
            source=self.samples.source,
            num_rows=len(self.samples),
            checked=rows,
            settings=settings_of(self.rules),
            is_whole=is_whole,
            sizes=self.sizes[: self.num_measured],
            shrunk=self.shrunk,
            defects=tuple(self.defects),
            kinds=dict(self.kinds),
            num_empty_thinking=self.num_empty_thinking,
            num_placed=self.num_placed,
            unused_keys=dict(self.unused_keys.most_common()),
        )
