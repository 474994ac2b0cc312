"""What is known of data before it is decoded: made once, kept, shown, taken by a dataset; tools that are handed in."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PIXELS, run
from PIL import Image

from ovis25.data import ConversationDataset, DataError
from ovis25.data import errors as errors_module
from ovis25.data.dataset import SampleDataset
from ovis25.data.errors import DefectKind, SampleError
from ovis25.data.measure import LengthLimits, Rules
from ovis25.data.samples import Defect, Samples
from ovis25.data.survey import Survey, make_survey
from ovis25.data.survey_text import defects_text, survey_text
from ovis25.processing import VisualLimits
from ovis25.tools import CropTool, Toolbox, ToolError, load_tools
from ovis25.training import build
from ovis25.training.config import ConfigError, load_config
from ovis25.training.run import train


def row(question="What?", answer="It is.", **others) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **others}


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """Ten samples: five are sound, one of those is long; the others have defects of four kinds."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno header")
    return [
        row(id="text"),
        row("<image>What?", image="gone.png", id="gone"),
        row("<image>What?", image="a.png", source="web"),
        row("<image>What?", image="broken.png"),
        row("<image><image>What?", image=["a.png", "a.png"]),
        row("word " * 600),
        row("", id="empty"),
        row("<image>What?", image="lost.png"),
        row(answer="<think>\n\n</think>\n\nYes."),
        row("<video>What?", video_frames=["a.png", "a.png", "a.png"]),
    ]


def rules_of(processor, **lengths) -> Rules:
    return Rules(processor, VisualLimits(**PIXELS), LengthLimits(**{"text_max_length": 200, **lengths}))


@pytest.fixture
def survey(rows, processor, tmp_path) -> Survey:
    return make_survey(Samples.of(rows, tmp_path), rules_of(processor))


def test_a_survey_finds_every_defect_with_its_kind(survey):
    found = {kind: [defect.index for defect in defects] for kind, defects in survey.by_kind().items()}
    assert found == {"missing_file": [1, 7], "unreadable_file": [3], "too_long": [5], "empty_turn": [6]}
    assert list(found)[0] == DefectKind.MISSING_FILE, "the most frequent first"
    assert survey.kept.tolist() == [0, 2, 4, 8, 9] and len(survey.sizes) == 5
    assert survey.kinds == {"text": 2, "single_image": 1, "multiple_image": 1, "video": 1}
    assert survey.unused_keys == {"source": 1} and survey.num_empty_thinking == 1
    defect = survey.defects[0]
    assert (defect.index, defect.id, defect.field, defect.origin) == (1, "gone", "image", None)
    assert not defect.is_long and survey.by_kind()["too_long"][0].is_long
    assert isinstance(defect.error(), SampleError) and defect.error().kind == defect.kind


def test_a_survey_comes_back_from_its_files(survey, rows, processor, tmp_path):
    samples, rules = Samples.of(rows, tmp_path), rules_of(processor, multimodal_max_length=60)
    survey = make_survey(samples, rules)
    assert survey.shrunk, "budgets are part of what is kept"
    survey.save(tmp_path / "kept" / "survey.json")
    again = Survey.load(tmp_path / "kept" / "survey.json")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["survey.json", "survey.npz"]
    for name in Survey.__dataclass_fields__:
        before, after = getattr(survey, name), getattr(again, name)
        assert np.array_equal(before, after) if name == "sizes" else before == after, name
    assert again.statistics() == survey.statistics() and survey_text(again) == survey_text(survey)
    one, other = (SampleDataset(samples, made, rules, on_bad_sample="skip") for made in (survey, again))
    assert len(one) == 5 and all(one[i]["input_ids"].equal(other[i]["input_ids"]) for i in range(5))
    assert max(map(len, (other[i]["input_ids"] for i in range(5)))) <= 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("{"), "Expecting property name"),
        (lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 0')), "another version"),
        (lambda path: path.write_text(path.read_text().replace('"missing_file"', '"lost"')), "'lost' is not a valid"),
        (lambda path: path.with_suffix(".npz").write_bytes(b"PK"), "cannot be read: "),
        (lambda path: path.with_suffix(".npz").unlink(), "No such file"),
    ],
)
def test_a_damaged_survey_is_one_line(survey, tmp_path, damage, message):
    path = tmp_path / "survey.json"
    survey.save(path)
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        Survey.load(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"the survey {path} cannot be read: ") and text.endswith("make it anew")


def test_a_survey_serves_its_own_rows_and_settings_alone(survey, rows, processor, tmp_path):
    options = {"on_bad_sample": "skip", "text_max_length": 200, **PIXELS}
    taken = ConversationDataset(rows, processor, tmp_path, survey=survey, **options)
    assert taken.survey is survey and len(taken) == 5 and len(taken.skipped) == 5
    for changed, values, message in (
        (rows[:9], options, "number of rows 10, now it is 9"),
        (rows, {**options, "text_max_length": 300}, "text_max_length 200, now it is 300"),
        (rows, {**options, "max_frames": 9}, "max_frames 8, now it is 9"),
        (rows, {**options, "tools": []}, r"tools \['Crop'\], now it is \[\]"),
    ):
        with pytest.raises(DataError, match=message):
            ConversationDataset(changed, processor, tmp_path, survey=survey, **values)


def test_a_dataset_refuses_what_may_not_be_skipped(survey, rows, processor, tmp_path):
    samples, rules = Samples.of(rows, tmp_path), rules_of(processor)
    with pytest.raises(DataError, match=r"^5 of 10 samples have defects:\n  samples\[1\] \(id .gone.\), field image"):
        SampleDataset(samples, survey, rules)
    first = make_survey(samples, rules, stops_at_form=True)
    assert not first.is_whole and [defect.index for defect in first.defects] == [1, 6, 7] and not len(first.sizes)
    for on_bad_sample in ("error", "skip"):
        with pytest.raises(DataError, match=r"(?s)^3 of 10 .*are checked once these are mended\.$"):
            SampleDataset(samples, first, rules, on_bad_sample=on_bad_sample)
    long_may_go = rules_of(processor, on_long_sample="skip")
    with pytest.raises(DataError, match="^4 of 10 samples have defects") as caught:
        SampleDataset(samples, make_survey(samples, long_may_go), long_may_go)
    assert "text_max_length" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "^samples holds no sample$"),
        (range(0), "^samples holds no sample$"),
        (None, "^data_path is null; give a data file, or a list of rows$"),
        ({"conversations": []}, "^data_path is a dict"),
        (7, "^data_path is an? int"),
        (b"a.json", "^data_path is a bytes"),
    ],
)
def test_what_is_no_set_of_rows_is_one_line(data, message, processor):
    with pytest.raises(DataError, match=message):
        ConversationDataset(data, processor)


def test_the_renderer_lists_twenty(survey):
    defect = survey.defects[0]
    text = defects_text([defect] * 23, 50, "a.json")
    assert text.splitlines()[0] == "23 of 50 samples have defects:" and text.count("a.json[1]") == 20
    assert text.endswith("  ... and 3 more\nMend them, or set on_bad_sample to skip.")
    assert defects_text([defect], 50, "a.json").startswith("1 of 50 samples has a defect:\n  a.json[1]")
    shown = survey_text(survey)
    assert shown.startswith("samples: 5 of 10 samples can be used\n") and "missing file: 2\n  samples[1]" in shown
    assert "too long: 1" in shown and "unread   source (1)" in shown and "2 text, 1 single image" in shown


def test_what_is_listed_as_skipped_keeps_its_form():
    defect = Defect(3, "a", "image", "gone", "Bring it", DefectKind.TOO_LONG, "b.json[1]")
    assert json.dumps(defect.record()) == (
        '{"index": 3, "id": "a", "field": "image", "problem": "gone", "cure": "Bring it", "is_long": true, '
        '"origin": "b.json[1]"}'
    )


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (row(conversation=[{"from": "human", "value": "x"}]), "unread_key"),
        (row(img="a.png"), "unread_key"),
        (row(tools="[{}]"), "unread_key"),
        (row("<image>What?"), "placeholders"),
        (row(answer="<image>A dog.", image="a.png"), "placeholders"),
        (row(image="http://x/a.png"), "source"),
        (row(image="data:image/png;base64,###"), "source"),
        (row(answer="<think>so"), "thinking"),
        (row(answer="half \ud83d"), "characters"),
        (row("<|im_start|>"), "characters"),
        (row(output="Something else."), "conflict"),
        (row(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]), "conflict"),
        (row(image="a.png", images=["b.png"]), "conflict"),
        (row(weight=0), "nothing_learned"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "turn_order"),
        ({"conversations": [{"from": "ignored_gpt", "value": "x"}]}, "nothing_learned"),
        ({"conversations": []}, "form"),
        (7, "form"),
    ],
)  # fmt: skip
def test_every_sort_of_defect_has_its_code(made, kind, processor, tmp_path):
    (defect,) = make_survey(Samples.of([made], tmp_path), Rules(processor)).defects
    assert defect.kind == kind, defect


def test_every_kind_is_raised_somewhere():
    folder = Path(errors_module.__file__).parent
    text = "".join(file.read_text() for file in folder.rglob("*.py"))
    raised = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert {kind.name for kind in DefectKind} <= raised


def test_each_row_is_parsed_once_where_defects_are_skipped(rows, processor, tmp_path, monkeypatch):
    parsed, parse = [], Samples.parse
    monkeypatch.setattr(Samples, "parse", lambda self, index: parsed.append(index) or parse(self, index))
    dataset = ConversationDataset(rows, processor, tmp_path, on_bad_sample="skip", text_max_length=200, **PIXELS)
    assert parsed == list(range(10)) and len(dataset) == 5


# -- tools of the user


class MirrorTool:
    """A tool of a user: the image, mirrored, and as wide as it is told."""

    name = "Mirror"
    description = "Mirrors the image."
    usage = "Mirror WIDTH"

    def run(self, arguments, images):
        if not arguments.isdecimal():
            raise ToolError(f"{arguments!r} is no width")
        return images[-1].transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((int(arguments), images[-1].height))


READY = MirrorTool()


def mirror_row(call: str = "Mirror 64", **others) -> dict:
    return row("<image>What?", f"<tool_call>{call}</tool_call><image>It is.", image="a.png", **others)


def test_a_users_tool_makes_pictures_in_training_data(rows, processor, tmp_path):
    tools = Toolbox([CropTool(), MirrorTool()])
    mirrored = MirrorTool().run("64", [Image.open(tmp_path / "a.png")])
    mirrored.save(tmp_path / "b.png")
    by_file = mirror_row()
    by_file["image"] = ["a.png", "b.png"]
    expected = ConversationDataset([by_file], processor, tmp_path, **PIXELS)[0]
    for given in (tools, [MirrorTool()]):
        dataset = ConversationDataset([mirror_row()], processor, tmp_path, tools=given, **PIXELS)
        item = dataset[0]
        assert all(item[name].equal(expected[name]) for name in expected)
        assert dataset.lengths.tolist() == [len(item["input_ids"])]
    both = [mirror_row(), mirror_row("Crop [0, 0, 0.5, 1]")]
    assert len(ConversationDataset(both, processor, tmp_path, tools=tools, **PIXELS)) == 2
    with pytest.raises(DataError, match="there is no tool 'Mirror'; the tools are Crop"):
        ConversationDataset([mirror_row()], processor, tmp_path, **PIXELS)
    with pytest.raises(DataError, match=r"the call 'Mirror x' fails: 'x' is no width"):
        ConversationDataset([mirror_row("Mirror x")], processor, tmp_path, tools=tools, **PIXELS)


def test_a_config_names_tools(rows, write_config, tmp_path, processor, capsys):
    (tmp_path / "data.json").write_text(json.dumps([mirror_row(), mirror_row("Crop [0, 0, 0.5, 1]")] * 2))
    settings = {"data_path": str(tmp_path / "data.json"), "max_steps": 1, "save_strategy": "no"}
    mirror = f"{__name__}:MirrorTool"
    train(load_config(write_config(**settings, tools=f"Crop, {mirror}")), dry_run=True)
    assert re.search(r"samples +4\b", capsys.readouterr().out)
    # a step over all four samples, whose pictures a worker makes
    trained = {"per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    results = run(write_config(**settings, **trained, tools=["Crop", mirror]))
    assert results["finished"] and not (tmp_path / "out" / "skipped_samples.jsonl").exists()
    assert json.loads((tmp_path / "out" / "train_config.json").read_text())["tools"] == ["Crop", mirror]
    with pytest.raises(DataError, match="there is no tool 'Mirror'"):
        train(load_config(write_config(**settings, output_dir=str(tmp_path / "other"))), dry_run=True)


def test_tools_are_found_by_their_names():
    names = ["Crop", f"{__name__}:MirrorTool"]
    assert list(load_tools(names).tools) == ["Crop", "Mirror"]
    assert load_tools([f"{__name__}:READY"]).tools["Mirror"] is READY and not load_tools([]).tools


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["crop"], "there is no tool 'crop'; did you mean Crop; your own are written package.module:Name"),
        (["Zoom"], "there is no tool 'Zoom'; the built-in tools are Crop; your own"),
        (["no_such_package:Tool"], "'no_such_package:Tool' cannot be made: ModuleNotFoundError: .*PYTHONPATH"),
        (["json:Tool"], "'json:Tool' cannot be made: AttributeError: "),
        ([":Tool"], "there is no tool ':Tool'"),
        (["json:JSONDecoder"], r"lacks name, description, usage, run\(arguments, images\)"),
        (["fractions:Fraction"], "lacks name, description, usage"),
        (["Crop", "Crop"], "two tools are named Crop"),
        ([f"{__name__}:MirrorTool", f"{__name__}:READY"], "two tools are named Mirror"),
    ],
)
def test_a_tool_that_is_none_is_refused_before_anything_is_loaded(write_config, names, message):
    with pytest.raises(ConfigError, match=f"^tools: .*{message}") as caught:
        build.check_before_loading(load_config(write_config(tools=names)))
    assert "\n" not in str(caught.value)
