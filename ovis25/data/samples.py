"""Rows as samples: a row is parsed and its files are found in one go; a row that cannot be used is a `Defect`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ovis25.data.errors import DataError, DefectKind, SampleError, label, told
from ovis25.data.keys import ORIGIN_KEY
from ovis25.data.schema import Sample, ToolImage, parse_sample
from ovis25.data.source import read_rows
from ovis25.data.sources import find_file, kind_of
from ovis25.processing.image import ImageSource


@dataclass(frozen=True)
class Defect:
    """One sample that cannot be used as it is: which one, what sort of thing is wrong with which field, the cure.

    `origin` is file and index, for a row of a set that was joined from several files.
    """

    index: int
    id: str | None
    field: str
    problem: str
    cure: str
    kind: DefectKind = DefectKind.FORM
    origin: str | None = None

    @property
    def is_long(self) -> bool:
        """Whether nothing is wrong with the sample but its length."""
        return self.kind == DefectKind.TOO_LONG

    def describe(self, source: str) -> str:
        """One line: which sample of `source`, which field, what is wrong, the cure."""
        place = self.origin or f"{source}[{self.index}]"
        return f"{_with_id(place, self.id)}, {told(self.field, self.problem, self.cure)}"

    def error(self) -> SampleError:
        """What was raised when the defect was found."""
        return SampleError(self.field, self.problem, self.cure, self.kind)

    def record(self) -> dict:
        """The defect as `skipped_samples.jsonl` has it."""
        record = asdict(self)
        origin = record.pop("origin")
        del record["kind"]
        return {**record, "is_long": self.is_long, "origin": origin}


class Samples(Sequence):
    """The rows of a data set as samples. Item i is row i, parsed, with the paths of the files that it names.

    Args:
        rows: a list, or any other sequence of rows that are made on demand.
        source: how messages call the set.
        folder: where relative paths start.

    Raises:
        SampleError: by item, what is wrong with the row.
    """

    def __init__(self, rows: Sequence, source: str, folder: Path):
        self.rows, self.source, self.folder = rows, source, folder
        self.is_generated = not isinstance(rows, list)

    @classmethod
    def of(cls, data: "str | Path | Sequence", image_folder: str | Path | None = None) -> "Samples":
        """The samples of a data file (see `source.read_rows`) or of a sequence of rows.

        Relative paths start at `image_folder`, else at the data file's folder, else at the working directory.

        Raises:
            DataError: the file cannot be read, there is no row, or `image_folder` is no folder.
        """
        if isinstance(data, cls):
            return data
        is_file = isinstance(data, (str, Path))
        is_rows = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        if not is_file and (not is_rows or isinstance(data, (bytes, dict))):
            raise DataError(f"data_path is {kind_of(data)}; give a data file, or a list of rows")
        rows, source = (read_rows(data), str(data)) if is_file else (data, "samples")
        if not len(rows):
            raise DataError(f"{source} holds no sample")
        folder = Path(image_folder or (Path(data).parent if is_file else ".")).absolute()
        if image_folder is not None and not folder.is_dir():
            raise DataError(f"image_folder {image_folder} is no folder")
        return cls(rows, source, folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row_index: int) -> Sample:
        return self.read(row_index)

    def read(self, row_index: int, suggest: bool = True) -> Sample:
        """As item `row_index`; without `suggest` nobody looks for the file that was meant, which reads folders."""
        return locate(self.parse(row_index), self.folder, suggest)

    def parse(self, row_index: int) -> Sample:
        """The row's text and the names of its files, for who needs no file."""
        return parse_sample(self.rows[row_index])

    def defect(self, row_index: int, error: SampleError) -> Defect:
        """The error as the record of a row that cannot be used."""
        name, origin = self._name_and_origin(row_index)
        return Defect(row_index, name, error.field, error.problem, error.cure, error.kind, origin)

    def name(self, row_index: int) -> str:
        """File and index of a row, and its id where it has one: `train.json[3] (id "s3")`."""
        name, origin = self._name_and_origin(row_index)
        return _with_id(origin or f"{self.source}[{row_index}]", name)

    def _name_and_origin(self, row_index: int) -> tuple[str | None, str | None]:
        row = self.rows[row_index]
        name, origin = (row.get("id"), row.get(ORIGIN_KEY)) if isinstance(row, dict) else (None, None)
        # an id that is neither text nor number is a defect of its own
        name = label(name) if isinstance(name, (str, int, float)) else None
        return name, origin if isinstance(origin, str) else None


def _with_id(place: str, name: str | None) -> str:
    return place if name is None else f'{place} (id "{name}")'


def locate(sample: Sample, folder: Path, suggest: bool = True) -> Sample:
    """The sample with its relative paths in `folder`.

    Raises:
        SampleError: a file does not exist; with `suggest` it names the neighbour that was meant.
    """

    def find(source: ImageSource | ToolImage) -> ImageSource | ToolImage:
        is_name = isinstance(source, (str, Path))
        return find_file(source, folder, sample.visual_field, suggest) if is_name else source

    if isinstance(sample.video, list):
        return replace(sample, video=[find(frame) for frame in sample.video])
    if sample.video is not None:
        return replace(sample, video=find(sample.video))
    return replace(sample, images=[find(image) for image in sample.images])
