"""Configuration: official files load, values convert, wrong ones are named, origins are kept."""

import copy
from pathlib import Path

import pytest

from swinq import config as configuration
from swinq import config_files, schema
from swinq.config import Config, default_config, merge_file, merge_pairs, merge_recipe, put
from swinq.defaults import DEFAULTS
from swinq.errors import ConfigError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, name: str = "model.yaml") -> str:
    """The message with which a configuration file is refused."""
    with pytest.raises(ConfigError) as caught:
        merge_file(default_config(), written(tmp_path, name, text))
    assert caught.value.fix
    return str(caught.value)


SHIPPED = sorted(config_files.shipped("model").values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_model_loads_and_says_its_name(path: Path) -> None:
    config = default_config()
    merge_file(config, path)
    if path.stem != "demo":
        assert path.stem == config.MODEL.NAME
    assert config.origins["MODEL.TYPE"].endswith(path.name)


def test_there_are_27_models_and_the_demo() -> None:
    assert len(SHIPPED) == 28


def test_an_official_file_with_training_sections_loads(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "official.yaml",
        "BASE: ['']\n"
        "DATA: {IMG_SIZE: 384, DATASET: imagenet22K}\n"
        "MODEL: {TYPE: swin, NAME: x, SWIN: {DEPTHS: [2, 2, 18, 2], WINDOW_SIZE: 12}}\n"
        "TRAIN: {EPOCHS: 30, WEIGHT_DECAY: 1e-8, LR_SCHEDULER: {NAME: linear}}\n"
        "AUG: {AUTO_AUGMENT: none, CUTMIX_MINMAX: null}\n"
        "TEST: {CROP: False}\n"
        "AMP_OPT_LEVEL: O1\n",
    )
    config = default_config()
    merge_file(config, path)
    assert config.TRAIN.WEIGHT_DECAY == 1e-8  # YAML 1.1 reads 1e-8 as a text
    assert config.MODEL.SWIN.DEPTHS == [2, 2, 18, 2]
    assert config.MODEL.NUM_CLASSES == 21841
    assert config.TEST.CROP is False
    assert config.ignored == ["AMP_OPT_LEVEL"]
    assert "not used here: AMP_OPT_LEVEL" in configuration.describe(config, config.origins)


def test_base_files_are_merged_first(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    written(tmp_path, "parts/data.yaml", "DATA: {IMG_SIZE: 256, BATCH_SIZE: 3}")
    path = written(tmp_path, "m.yaml", "BASE: [parts/data.yaml]\nDATA: {BATCH_SIZE: 5}")
    config = default_config()
    merge_file(config, path)
    assert (config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE) == (256, 5)
    assert config.origins["DATA.IMG_SIZE"].endswith("parts/data.yaml")


@pytest.mark.parametrize("base", ["../outside.yaml", "/etc/hostname", "link.yaml"])
def test_base_may_not_leave_the_folder(tmp_path: Path, base: str) -> None:
    written(tmp_path, "outside.yaml", "TAG: outside")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    message = refusal(inside, f"BASE: ['{base}']")
    assert base in message and "leads out of" in message


def test_base_may_not_go_in_a_circle(tmp_path: Path) -> None:
    written(tmp_path, "b.yaml", "BASE: [a.yaml]")
    assert "a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path, "BASE: [b.yaml]", "a.yaml")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CALIB: {PERCENTIL: 99}", "did you mean CALIB.PERCENTILE?"),
        ("PERCENTILE: 99", "did you mean CALIB.PERCENTILE?"),
        ("calib: {}", "did you mean CALIB?"),
        ("MODEL: {SWIM: {}}", "did you mean MODEL.SWIN?"),
        ("XYZZY: 1", "--print-config"),
        ("CALIB: 5", "it is a section"),
        ("CALIB: {PERCENTILE: {A: 1}}", "wanted a number"),
        ("CALIB: {NUM_BATCHES: ten}", "'ten'"),
        ("CALIB: {NUM_BATCHES: 2.5}", "wanted an integer"),
        ("CALIB: {NUM_BATCHES: true}", "wanted an integer"),
        ("CALIB: {PERCENTILE: .nan}", "wanted a number"),
        ("CALIB: {NUM_BATCHES: 99999999999}", "wanted an integer"),
        ("TEST: {CROP: 2}", "wanted true or false"),
        ("TAG: [1]", "wanted a text"),
        ("TAG: a/b", "wanted a name without slashes"),
        ("MODEL: {SWIN: {DEPTHS: 2}}", "wanted a list of integers"),
        ("MODEL: {SWIN: {DEPTHS: [2, x]}}", "wanted a list of integers"),
        ("MODEL: {SWIN: {DEPTHS: []}}", "one positive integer per stage"),
        ("MODEL: {TYPE: swin_moe}", "wanted one of swin, swinv2"),
        ("MODEL: {SWIN: {APE: true}}", "absolute position embedding is not supported"),
        ("MODEL: {SWIN: {QK_SCALE: 0.5}}", "not supported"),
        ("MODEL: {SWINV2: {PATCH_NORM: false}}", "not supported"),
        ("QUANT: {INPUT: {MIGRATION: [0.5, 2]}}", "from 0 to 1"),
        ("QUANT: {LAYERS: [{PATTERN: x}]}", "int8|int8-unrounded|fp16"),
        ("QUANT: {LAYERS: [{PATTERN: x, PRECISION: int4}]}", "int4"),
        ("QUANT: {LAYERS: [x]}", "{PATTERN, PRECISION}"),
        ("TAG: a\nTAG: b", "line 2, column 1: the key TAG stands there twice"),
        ("TAG: &a x\nOUTPUT: *a", "aliases"),
        ("TAG: [", "line 1"),
        ("- TAG", "holds a list"),
        ("TAG: !!python/object/apply:os.system [id]", "python/object"),
        ("BASE: 3", "wanted a list of file names"),
        ("BASE: [absent.yaml]", "absent.yaml"),
        ("[" * 1500, "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name_value_and_fix(
    tmp_path: Path, text: str, wanted: str
) -> None:
    message = refusal(tmp_path, text)
    assert wanted in message
    assert len(message.splitlines()) <= 10
    assert max(map(len, message.splitlines())) < 400


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\x80\x02}q\x00\xff")
    with pytest.raises(ConfigError, match="not a text file"):
        merge_file(default_config(), path)
    path.write_bytes(b"#" * (config_files.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        merge_file(default_config(), path)


@pytest.mark.parametrize(
    ("key", "value", "becomes"),
    [
        ("CALIB.PERCENTILE", 99, 99.0),
        ("CALIB.PERCENTILE", "1e2", 100.0),
        ("CALIB.NUM_BATCHES", "12", 12),
        ("CALIB.NUM_BATCHES", 12.0, 12),
        ("TAG", 224, "224"),
        ("DATA.DATA_PATH", None, ""),
        ("TEST.CROP", "no", False),
        ("TEST.CROP", 1, True),
        ("QUANT.BIAS_CORRECTION", "False", False),
        ("MODEL.SWIN.DEPTHS", "[2,2,18,2]", [2, 2, 18, 2]),
        ("MODEL.SWIN.DEPTHS", (1, 1), [1, 1]),
        ("MODEL.SWIN.QK_SCALE", "None", None),
        ("AUG.CUTMIX_MINMAX", "[0.2, 1]", [0.2, 1.0]),
        ("QUANT.ALLOW_DEAD", ["layers.0.*", 7], ["layers.0.*", "7"]),
        (
            "QUANT.LAYERS",
            '[{PATTERN: "layers.3.*", PRECISION: fp16}]',
            [{"PATTERN": "layers.3.*", "PRECISION": "fp16"}],
        ),
    ],
)
def test_a_value_is_read_as_its_keys_type(key: str, value: object, becomes: object) -> None:
    config = default_config()
    put(config, key, value, "--opts")
    found = dict(configuration.leaves(config))[key]
    assert found == becomes and type(found) is type(becomes)
    assert config.origins == {key: "--opts"}


@pytest.mark.parametrize("key", sorted(dict(configuration.leaves(DEFAULTS))))
def test_every_default_passes_its_own_rule(key: str) -> None:
    default = dict(configuration.leaves(DEFAULTS))[key]
    put(default_config(), key, default, "test")


def test_pairs_want_a_value_for_each_key() -> None:
    config = default_config()
    merge_pairs(config, ["CALIB.SEED", "3", "TAG", "second"])
    assert (config.CALIB.SEED, config.TAG) == (3, "second")
    with pytest.raises(ConfigError, match="a key without a value: 'TAG'"):
        merge_pairs(config, ["CALIB.SEED", "3", "TAG"])
    with pytest.raises(ConfigError, match="FUSED_LAYERNORM would decide nothing"):
        merge_pairs(config, ["FUSED_LAYERNORM", "True"])


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("TRAIN.EPOCHS", "3", "training from scratch; QAT has its own: QAT.EPOCHS"),
        ("TRAIN.LR_SCHEDULER.NAME", "linear", "a warm-up, then a cosine"),
        ("TRAIN.AUTO_RESUME", "false", "goes on from its newest checkpoint"),
        ("SAVE_FREQ", "3", "QAT.SAVE_STEPS"),
        ("MODEL.DROP_RATE", "0.1", "decides nothing here"),
        ("TEST.SHUFFLE", "true", "decides nothing here"),
        ("DATA.PIN_MEMORY", "false", "decides nothing here"),
        ("DATA.INTERPOLATION", "random", "'random'.* wanted one of bicubic, bilinear"),
    ],
)
def test_pairs_that_would_change_nothing_are_refused(key: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} .*{why}"):
        merge_pairs(default_config(), [key, value])


def test_pairs_set_what_training_uses() -> None:
    config = default_config()
    pairs = {
        "TRAIN.WEIGHT_DECAY": "1e-8",
        "TRAIN.OPTIMIZER.BETAS": "[0.9, 0.95]",
        "AUG.CUTMIX_MINMAX": "[0.2, 0.8]",
        "MODEL.DROP_PATH_RATE": "0.2",
        "AMP_ENABLE": "no",
        "QAT.LEARN_RANGES": "[]",
        "QAT.COMPILE": "no",
    }
    merge_pairs(config, [word for pair in pairs.items() for word in pair])
    assert config.TRAIN.OPTIMIZER.BETAS == [0.9, 0.95] and config.QAT.LEARN_RANGES == []
    assert (config.AMP_ENABLE, config.QAT.COMPILE) == (False, "no")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("QAT.EPOCHS", "0"),
        ("QAT.LR", "0"),
        ("QAT.WARMUP", "1"),
        ("QAT.MIN_LR", "1.5"),
        ("QAT.LEARN_RANGES", "[output, bias]"),
        ("QAT.FIX_RANGES", "-0.1"),
        ("QAT.EMA", "1"),
        ("QAT.AMP_TYPE", "fp32"),
        ("QAT.COMPILE", "maybe"),
        ("QAT.PARALLEL", "zero"),
        ("QAT.SAVE_STEPS", "-1"),
        ("QAT.KEEP", "0"),
        ("QAT.DISTILL.TEMPERATURE", "0"),
        ("QAT.DISTILL.SCALE", "-1"),
        ("TRAIN.CLIP_GRAD", "-1"),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9]"),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9, 1.0]"),
        ("AUG.CUTMIX_MINMAX", "[0.8, 0.2]"),
        ("AUG.CUTMIX_MINMAX", "[0.5, 0.5]"),
        ("AUG.REMODE", "grey"),
        ("AUG.MIXUP_PROB", "2"),
        ("MODEL.DROP_PATH_RATE", "1"),
        ("MODEL.LABEL_SMOOTHING", "1"),
    ],
)
def test_a_training_value_out_of_range_is_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is '.*wanted"):
        merge_pairs(default_config(), [key, text])


def test_the_kinds_of_ranges_are_those_that_can_learn() -> None:
    from swinq.train.ranges import KINDS

    assert schema.RANGE_KINDS == KINDS


def test_yes_and_no_mean_themselves_in_a_file(tmp_path: Path) -> None:
    config = default_config()
    text = "DATA: {CACHE_MODE: no}\nQAT: {COMPILE: yes}"  # YAML 1.1 reads both as booleans
    merge_file(config, written(tmp_path, "model.yaml", text))
    assert (config.DATA.CACHE_MODE, config.QAT.COMPILE) == ("no", "yes")


def test_a_recipe_changes_only_quantization(tmp_path: Path) -> None:
    config = default_config()
    text = "QUANT: {BIAS_CORRECTION: false}\nCALIB: {METHOD: mse}\nQAT: {LEARN_RANGES: [input]}"
    path = written(tmp_path, "mine.yaml", text)
    merge_recipe(config, path)
    assert (config.QUANT.NAME, config.QUANT.BIAS_CORRECTION) == ("mine", False)
    assert config.CALIB.METHOD == "mse" and config.QAT.LEARN_RANGES == ["input"]
    assert config.origins["QUANT.BIAS_CORRECTION"] == "recipe mine"
    with pytest.raises(ConfigError, match="holds DATA"):
        merge_recipe(config, written(tmp_path, "bad.yaml", "QUANT: {}\nDATA: {}"))
    with pytest.raises(ConfigError, match="no QUANT section"):
        merge_recipe(config, written(tmp_path, "bad.yaml", "CALIB: {}"))


@pytest.mark.parametrize("name", sorted(config_files.shipped("recipe")))
def test_every_shipped_recipe_loads(name: str) -> None:
    config = default_config()
    merge_recipe(config, config_files.find("recipe", name))
    assert config.QUANT.NAME == name
    if name == "int8":  # the file spells the defaults out; config.py stays their one place
        assert config == default_config()


def test_a_saved_configuration_loads_back_to_the_same(tmp_path: Path) -> None:
    config = default_config()
    merge_file(config, config_files.find("model", "swinv2_large_patch4_window12_192_22k"))
    put(config, "QUANT.LAYERS", [{"PATTERN": "layers.3.*", "PRECISION": "fp16"}], "--opts")
    put(config, "TAG", "no: #1 'quoted'\nline", "--tag")
    put(config, "TRAIN.WEIGHT_DECAY", 1e-8, "a file\nDATA: 3")  # an origin cannot become a key
    path = tmp_path / "new" / "config.yaml"
    configuration.save(config, path)
    again = default_config()
    merge_file(again, path)
    assert again == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_saving_where_nothing_can_be_written_is_a_named_error(tmp_path: Path) -> None:
    written(tmp_path, "file", "")
    with pytest.raises(ConfigError, match="cannot write .*file/config.yaml"):
        configuration.save(default_config(), tmp_path / "file" / "config.yaml")


def test_the_description_names_every_change_and_its_origin() -> None:
    config = default_config()
    put(config, "CALIB.PERCENTILE", 99.9, "--percentile")
    put(config, "CALIB.NUM_BATCHES", 10, "--num-calib-batch")  # stated, and the default
    text = configuration.describe(config, config.origins)
    assert "1 of" in text
    assert "--percentile: CALIB.PERCENTILE=99.9" in text
    assert "NUM_BATCHES" not in text


def test_a_frozen_configuration_is_changed_by_put_only() -> None:
    config = default_config()
    config.freeze()
    with pytest.raises(AttributeError):
        config.TAG = "x"
    put(config, "MODEL.NAME", "found", "checkpoint")
    assert config.MODEL.NAME == "found"


def test_a_copy_keeps_the_origins_and_is_independent() -> None:
    config = default_config()
    put(config, "TAG", "first", "--tag")
    other: Config = copy.deepcopy(config)
    put(other, "TAG", "second", "--opts")
    assert (config.TAG, config.origins) == ("first", {"TAG": "--tag"})
    assert other.origins == {"TAG": "--opts"}
    assert default_config().TAG == "default"


def test_models_and_recipes_are_found_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = config_files.find("model", "swin_tiny_patch4_window7_224")
    by_path = config_files.find("model", "configs/swin/swin_tiny_patch4_window7_224.yaml")
    assert by_name.resolve() == by_path.resolve()
    with pytest.raises(ConfigError, match="did you mean swin_tiny_patch4_window7_224?"):
        config_files.find("model", "swin_tiny_patch4_window7_242")
    with pytest.raises(ConfigError, match="is a folder"):
        config_files.find("model", str(tmp_path))


@pytest.mark.parametrize(
    ("path", "embedded"),
    [("digits", True), ("fake", True), ("fake:20", True), ("fake:x", False), ("./digits", False)],
)
def test_embedded_data_are_told_from_paths(path: str, embedded: bool) -> None:
    assert configuration.is_embedded(path) is embedded
