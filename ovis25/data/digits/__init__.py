"""Questions about strips of real handwritten digits, the embedded model's data: samples without end, and an exam's."""

from ovis25.data.digits.kinds import CROP_KINDS, KINDS, Question, questions
from ovis25.data.digits.samples import SOURCE_PREFIXES, DigitStrips, parse_source, write_samples
from ovis25.data.digits.strips import Strip, make_strip

__all__ = [
    "CROP_KINDS",
    "KINDS",
    "SOURCE_PREFIXES",
    "DigitStrips",
    "Question",
    "Strip",
    "make_strip",
    "parse_source",
    "questions",
    "write_samples",
]
