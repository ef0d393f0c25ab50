"""Configs of vegab: root as the schema, files, overrides, references, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vegab import ConfigRegistry, Key, UsageError, config_from_folder, resolve
from vegab.config import Override, differences, load_file, read_yaml, show


@pytest.fixture
def registry() -> ConfigRegistry:
    registry = ConfigRegistry()
    registry.set_root_config(
        {
            "n_filters": Key(16, "filters of the first layer"),
            "learning_rate": 0.1,
            "augmented": False,
            "optimizer": "adam",
            "lr_schedule": [[10, 0.1]],
            "weights": None,
            "optimizer_arguments": Key({}, "anything that the optimizer takes"),
            "model": Key({"depth": Key(2, "layers"), "width": 8}, "the network"),
            "teacher": {"depth": 3},
        }
    )
    registry["wide"] = {"n_filters": 64, "model": {"width": 32}}
    return registry


def value_at(config: Any, path: str) -> Any:
    """Return the value at a path of keys, joined by points."""
    for name in path.split("."):
        config = config[name]
    return config


def with_overrides(registry: ConfigRegistry, *pairs: tuple[str, str], raw: bool = False) -> Any:
    return registry.resolve("root", overrides=[Override(key, value, raw) for key, value in pairs])


# ---------------------------------------------------------------------------------------- registry


def test_a_named_config_is_root_with_its_differences(registry: ConfigRegistry) -> None:
    config = registry["wide"]
    assert config["n_filters"] == 64
    assert config["model"] == {"depth": 2, "width": 32}
    assert config["learning_rate"] == 0.1
    assert registry.names() == ["root", "wide"]
    assert "wide" in registry and "root" in registry and "narrow" not in registry


def test_every_read_is_a_deep_copy(registry: ConfigRegistry) -> None:
    registry["wide"]["model"]["width"] = 0
    registry["wide"]["lr_schedule"][0][0] = 0
    registry.get_root_config()["model"]["depth"] = 0
    assert registry["wide"]["model"] == {"depth": 2, "width": 32}
    assert registry["wide"]["lr_schedule"] == [[10, 0.1]]
    assert registry.get_root_config()["model"]["depth"] == 2


def test_keys_explain_themselves(registry: ConfigRegistry) -> None:
    (root,) = registry.schemas
    assert {key: about.help for key, about in root.keys.items()} == {
        "n_filters": "filters of the first layer",
        "model": "the network",
        "model.depth": "layers",
        "optimizer_arguments": "anything that the optimizer takes",
    }
    assert registry.get_root_config()["n_filters"] == 16


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dataset": 1}, "unknown key 'dataset' (root names every key: add it there)"),
        ({"n_filter": 1}, "unknown key 'n_filter'; did you mean 'n_filters'?"),
        ({"model": {"dept": 1}}, "unknown key 'model.dept'; did you mean 'depth'?"),
        ({"augmented": 1}, "augmented: 1 was given, true or false is expected"),
        ({"n_filters": True}, "n_filters: true was given, an integer is expected"),
        ({"model": 3}, "model: 3 was given, a mapping is expected"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not a finite number"),
        ({"weights": {1, 2}}, "weights: a value of type set is not plain data"),
    ],
)
def test_a_wrong_registration_is_an_error(
    registry: ConfigRegistry, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match="config 'new': " + re.escape(sentence)):
        registry["new"] = changes


def test_a_second_registration_is_an_error(registry: ConfigRegistry) -> None:
    for name in ("wide", "root"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            registry[name] = {}


def test_tuples_become_lists_and_integers_floats(registry: ConfigRegistry) -> None:
    registry["tuple"] = {"lr_schedule": ((1, 2),), "learning_rate": 1}
    config = registry["tuple"]
    assert config["lr_schedule"] == [[1, 2]]
    assert isinstance(config["learning_rate"], float)


# --------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    "key, text, path, expected",
    [
        ("n_filters", "10", "n_filters", 10),
        ("learning_rate", "-1e-4", "learning_rate", -1e-4),
        ("learning_rate", "1", "learning_rate", 1.0),
        ("augmented", "true", "augmented", True),
        ("optimizer", "no", "optimizer", "no"),
        ("optimizer", "10", "optimizer", "10"),
        ("optimizer", "", "optimizer", ""),
        ("optimizer", "100% [sure", "optimizer", "100% [sure"),
        ("optimizer", "a # b", "optimizer", "a # b"),
        ("optimizer", "|\n a\n b", "optimizer", "|\n a\n b"),
        ("optimizer", "None", "optimizer", "None"),
        ("weights", "None", "weights", None),
        ("weights", "fix #3", "weights", "fix #3"),
        ("weights", "a # b", "weights", "a # b"),
        ("weights", "# a", "weights", "# a"),
        ("weights", "*.h5", "weights", "*.h5"),
        ("weights", "&a b", "weights", "&a b"),
        ("weights", "note: a", "weights", "note: a"),
        ("weights", "a\nb", "weights", "a\nb"),
        ("weights", "a\n", "weights", "a\n"),
        ("weights", "'a # b'", "weights", "a # b"),
        ("weights", "12:30", "weights", "12:30"),
        ("weights", "2026-05-01", "weights", "2026-05-01"),
        ("weights", "[1, {a: null}]", "weights", [1, {"a": None}]),
        ("lr_schedule", "[[10, 0.1], [20, 0.01]]", "lr_schedule", [[10, 0.1], [20, 0.01]]),
        ("lr_schedule", "3,4", "lr_schedule", [3, 4]),
        ("lr_schedule", "a, 0.5", "lr_schedule", ["a", 0.5]),
        ("model.depth", "5", "model.depth", 5),
        ("width", "5", "model.width", 5),
        ("model", "{width: 5}", "model", {"depth": 2, "width": 5}),
        ("optimizer_arguments", "{momentum: 0.9}", "optimizer_arguments", {"momentum": 0.9}),
        ("optimizer_arguments.momentum", "0.9", "optimizer_arguments", {"momentum": 0.9}),
    ],
)
def test_overrides_are_read_as_yaml_of_the_default_s_type(
    registry: ConfigRegistry, key: str, text: str, path: str, expected: Any
) -> None:
    value = value_at(with_overrides(registry, (key, text)), path)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "key, text, sentence",
    [
        ("n_filter", "1", "unknown key 'n_filter'; did you mean 'n_filters'?"),
        ("n-filters", "1", "unknown key 'n-filters'; did you mean 'n_filters'?"),
        ("wdth", "1", "unknown key 'wdth'; did you mean 'model.width'?"),
        ("depth", "1", "the key 'depth' is ambiguous: give model.depth or teacher.depth"),
        ("n_filters", "1.5", "n_filters: 1.5 was given, an integer is expected"),
        ("n_filters", "null", "n_filters: null was given, an integer is expected"),
        ("n_filters", "ten", "n_filters: ten was given, an integer is expected"),
        ("lr_schedule", "3", "lr_schedule: 3 was given, a list is expected"),
        ("learning_rate", ".inf", "learning_rate: inf is not a finite number"),
        ("learning_rate", "[1", "learning_rate: this is not valid YAML"),
        ("weights", "!!python/name:os.system", "weights: this is not valid YAML"),
        ("weights", "{a: 1, a: 2}", "weights: this is not valid YAML: found duplicate key"),
        ("weights", "{1.5: 2}", "weights: the key 1.5 is not a word"),
        ("model.zz", "1", "unknown key 'model.zz'"),
        ("weights", "@/nowhere/file.yaml", "cannot read /nowhere/file.yaml"),
        ("optimizer", "${n_filter}", "${n_filter} refers to a key that is not there; did you mean"),
        ("optimizer", "${optimizer}", "the references optimizer -> optimizer form a circle"),
        ("n_filters", "${optimizer}", "n_filters: adam was given, an integer is expected"),
    ],
)
def test_a_wrong_override_is_one_sentence(
    registry: ConfigRegistry, key: str, text: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)) as refused:
        with_overrides(registry, (key, text))
    assert "\n" not in str(refused.value)


def test_of_a_key_given_twice_the_last_counts(registry: ConfigRegistry) -> None:
    assert with_overrides(registry, ("n_filters", "1"), ("n_filters", "2"))["n_filters"] == 2


def test_raw_text_is_taken_as_it_is(registry: ConfigRegistry) -> None:
    assert with_overrides(registry, ("weights", "[1]"), raw=True)["weights"] == "[1]"
    with pytest.raises(UsageError, match='n_filters: "10" was given, an integer is expected'):
        with_overrides(registry, ("n_filters", "10"), raw=True)


def test_a_value_can_come_from_a_file(registry: ConfigRegistry, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text("- [5, 0.5]\n- [6, 0.1]\n")
    config = with_overrides(registry, ("lr_schedule", f"@{tmp_path}/schedule.yaml"))
    assert config["lr_schedule"] == [[5, 0.5], [6, 0.1]]


# -------------------------------------------------------------------------------------- references


def test_references_follow_overrides_and_keep_types() -> None:
    registry = ConfigRegistry()
    registry.set_root_config(
        {
            "batch_size": 8,
            "valid": {"batch_size": "${batch_size}"},
            "name": "b${batch_size}-${rate}",
            "rate": 0.5,
            "list": ["${rate}"],
        }
    )
    config = registry.resolve("root", overrides=[Override("batch_size", "4")])
    assert config["valid"]["batch_size"] == 4
    assert config["name"] == "b4-0.5"
    assert config["list"] == [0.5]
    assert (
        registry.resolve("root", overrides=[Override("valid.batch_size", "2")])["name"] == "b8-0.5"
    )


# ------------------------------------------------------------------------------------------- files


def test_a_file_is_laid_over_its_bases_and_root(registry: ConfigRegistry, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.yaml").write_text("n_filters: 1\nmodel: {depth: 1, width: 1}\n")
    (tmp_path / "parts" / "2.json").write_text('{"model": {"depth": 2}, "lr_schedule": [[1, 1.0]]}')
    (tmp_path / "base.yaml").write_text("n_filters: 7\noptimizer: sgd\n")
    (tmp_path / "mine.yaml").write_text("extend: [parts/*]\nmodel:\n  width: 5\n")
    config = registry.resolve(str(tmp_path / "mine.yaml"), bases=[tmp_path / "base.yaml"])
    assert config["n_filters"] == 1
    assert config["optimizer"] == "sgd"
    assert config["model"] == {"depth": 2, "width": 5}
    assert config["lr_schedule"] == [[1, 1.0]]
    assert "extend" not in config


def test_a_resolved_config_can_be_fed_back(registry: ConfigRegistry, tmp_path: Path) -> None:
    config = registry["wide"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert registry.resolve(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "is empty; a config file holds a mapping"),
        ("# only a comment\n", "is empty; a config file holds a mapping"),
        ("- 1\n", "holds a list; a config file holds a mapping"),
        ("text", "holds text; a config file holds a mapping"),
        ("a: [\n", "this is not valid YAML"),
        ("n_filters: 1\nn_filters: 2\n", "line 2: this is not valid YAML: found duplicate key"),
        ("n_filters: x\n", "n_filters: x was given, an integer is expected"),
        ("n_filter: 1\n", "unknown key 'n_filter'; did you mean 'n_filters'?"),
        ("extend: [nothing*.yaml]\n", "there is no file nothing*.yaml to extend"),
        ("extend: 3\n", "extend is a list of file names"),
        ("extend: other.yaml\n", "mine.yaml extend each other in a circle"),
    ],
)
def test_a_wrong_file_is_named(
    registry: ConfigRegistry, tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "other.yaml").write_text("extend: [mine.yaml]\n")
    with pytest.raises(UsageError, match=re.escape(sentence)) as refused:
        registry.resolve(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(refused.value)


def test_a_missing_or_unknown_config_is_named(registry: ConfigRegistry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown config 'wid'; did you mean 'wide'\?"):
        registry.resolve("wid")
    with pytest.raises(UsageError, match=r"cannot read .*nothing\.yaml: No such file"):
        registry.resolve(str(tmp_path / "nothing.yaml"))


def test_a_folder_is_a_registry(tmp_path: Path) -> None:
    (tmp_path / "root.yaml").write_text(
        "n_filters: 16  # filters\nmodel: {depth: 2, sizes: [1,\n 2]}\n"
    )
    (tmp_path / "wide.yml").write_text("# Wider than the rest.\nn_filters: 64\n")
    (tmp_path / "deep.json").write_text('{"model": {"depth": 9}}')
    (tmp_path / "broken.yaml").write_text("n_filters: [")
    registry = config_from_folder(tmp_path)
    assert registry.names() == ["root", "broken", "deep", "wide"]
    assert registry["wide"]["n_filters"] == 64
    assert registry["deep"]["model"] == {"depth": 9, "sizes": [1, 2]}
    assert registry.summary("wide") == "Wider than the rest."
    with pytest.raises(UsageError, match=r"broken.yaml.*not valid YAML"):
        registry["broken"]


def test_a_folder_without_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no root\.yaml"):
        config_from_folder(tmp_path)


@pytest.mark.parametrize(
    "value", ["null", "True", "FALSE", "yes", "1", "a # b", "", " x", "[1]", None, True, 1e-3, [""]]
)
def test_what_is_shown_is_read_as_the_same_value(value: Any) -> None:
    assert read_yaml(show(value), "key") == value
    assert type(read_yaml(show(value), "key")) is type(value)


def test_differences_tell_types_apart() -> None:
    assert differences({"a": 1, "b": {"c": 1}}, {"a": 1.0, "b": {"c": 1, "d": 2}}) == {
        "a": (1, 1.0),
        "b.d": (..., 2),
    }


# ------------------------------------------------------------------------------------------- names


def test_a_name_is_registered_or_imported() -> None:
    from vegab import config

    assert resolve("tiny", "model", {"tiny": 3}) == 3
    assert resolve("vegab.config.Key", "model") is Key
    assert resolve("vegab.config:Key", "model") is Key
    assert resolve("config:Key", "model", search=["vegab"]) is Key
    assert resolve("vegab.config.Key.count", "model") is config.Key.count


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("tiyn", "model: there is no 'tiyn'; did you mean 'tiny'?"),
        ("vegab.config.Kye", "model: 'vegab.config.Kye': vegab.config has no 'Kye'; did you mean"),
        (
            "nowhere.at.All",
            "model: 'nowhere.at.All' cannot be imported: there is no module nowhere.at or nowhere",
        ),
        ("broken:Name", "model: 'broken:Name': importing broken failed: NameError"),
        (3, "model: 3 names nothing that could be imported"),
        ("", "model: '' names nothing that could be imported"),
        ("a b", "model: 'a b' names nothing that could be imported"),
    ],
)
def test_a_wrong_name_says_key_path_and_reason(
    name: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("undefined_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=re.escape(sentence)):
        resolve(name, "model", {"tiny": 3}, search=())


# -------------------------------------------------------------------------- kinds beside root's

FLOW = """
iterator: your_model.iterators.Trainer
batch_size: 16
num_steps: 100
learning_rate: 0.5
model_pars: {depth: 3, active: true, parts: [a, b]}
note: text
"""


@pytest.fixture
def flows(registry: ConfigRegistry, tmp_path: Path) -> ConfigRegistry:
    """Root as above, a schema for the engine of one sort of files, and such a file."""
    registry.add_schema(
        {
            "iterator": Key(None, "what does a step"),
            "batch_size": Key(None, "examples in a step"),
            "num_steps": None,
            "num_epochs": None,
            "log_freq": Key(1000, "steps between two lines"),
            "learning_rate": Key(0.1, "how fast"),
            "test_batch_size": "${batch_size}",
            "indices": {},
            "hook": {"op": "validation/op", "active": False},
        },
        required=[("iterator",), ("batch_size",), ("num_steps", "num_epochs")],
        title="keys of a flow",
    )
    registry.add_schema({"variant": "a", "log_freq": 5, "params": {}}, title="keys of a variant")
    (tmp_path / "flow.yaml").write_text(FLOW)
    return registry


Flow = Callable[..., dict[str, Any]]


@pytest.fixture
def flow(flows: ConfigRegistry, tmp_path: Path) -> Flow:
    """Resolves a file of that registry that holds a text, with overrides."""

    def resolved(content: str, *overrides: Override) -> dict[str, Any]:
        (tmp_path / "other.yaml").write_text(content)
        return flows.resolve(str(tmp_path / "other.yaml"), overrides=overrides)

    return resolved


def test_a_file_with_a_key_of_a_schema_may_have_keys_of_its_own(
    flow: Flow, flows: ConfigRegistry, tmp_path: Path
) -> None:
    config = flows.resolve(str(tmp_path / "flow.yaml"))
    assert config == {
        "iterator": "your_model.iterators.Trainer", "batch_size": 16, "num_steps": 100,
        "num_epochs": None, "log_freq": 1000, "learning_rate": 0.5, "test_batch_size": 16,
        "indices": {}, "hook": {"op": "validation/op", "active": False},
        "model_pars": {"depth": 3, "active": True, "parts": ["a", "b"]}, "note": "text",
    }  # fmt: skip
    with pytest.raises(UsageError, match="unknown key 'note'"):
        flow("learning_rate: 0.5\nnote: text\n")  # root has learning_rate
    assert flows["wide"]["model"] == {"depth": 2, "width": 32}


def test_the_first_schema_that_recognises_a_config_has_it(flow: Flow) -> None:
    assert "params" not in flow(FLOW + "variant: b\n")
    assert flow("variant: b\n")["log_freq"] == 5
    assert "variant" not in flow(FLOW + "log_freq: 7\n")


def test_layers_lie_in_the_order_of_root_s(flows: ConfigRegistry, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "iterator: base.It\nlog_freq: 1\nmodel_pars: {width: 8, depth: 1}\nhook: {mine: 1}\n"
    )
    (tmp_path / "part.yaml").write_text("note: part\nlog_freq: 2\n")
    (tmp_path / "mine.yaml").write_text("extend: part.yaml\nbatch_size: 4\nnum_epochs: 2\n")
    config = flows.resolve(
        str(tmp_path / "mine.yaml"),
        bases=[tmp_path / "base.yaml"],
        overrides=[Override("model_pars/depth", "5"), Override("hook.mine", "2")],
    )
    assert (config["iterator"], config["log_freq"], config["note"]) == ("base.It", 2, "part")
    assert config["model_pars"] == {"width": 8, "depth": 5}
    assert config["hook"] == {"op": "validation/op", "active": False, "mine": 2}


def test_registered_configs_and_folders_can_be_of_such_a_kind(
    flows: ConfigRegistry, tmp_path: Path
) -> None:
    flows["flow"] = {"iterator": "a.B", "batch_size": 4, "num_steps": 3, "stages": {1: "x"}}
    assert flows["flow"]["stages"] == {"1": "x"}
    with pytest.raises(ValueError, match="config 'wrong': log_freq: often was given, an integer"):
        flows["wrong"] = {"iterator": "a.B", "log_freq": "often"}
    with pytest.raises(ValueError, match="unknown key 'stages'"):
        flows["rootlike"] = {"stages": 3}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "small.yaml").write_text("# A small flow.\n" + FLOW)
    flows.add_folder(tmp_path / "folder")
    assert flows["small"]["note"] == "text" and flows.summary("small") == "A small flow."


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("batch_size: 4\nnum_steps: 1\n", "other.yaml: the key 'iterator' is missing"),
        (
            "iterator: ''\nbatch_size: 4\nnum_steps: 1\n",
            "other.yaml: the key 'iterator' is missing",
        ),
        (
            "iterator: a.B\nbatch_size: 4\n",
            "other.yaml: one of the keys 'num_steps' and 'num_epochs' is missing",
        ),
        (
            "iterator: a.B\nbach_size: 4\nnum_steps: 1\n",
            "the key 'batch_size' is missing; did you mean 'batch_size' by 'bach_size'?",
        ),
        (
            "iterator: a.B\nbatch_size: 4\nnum_epoch: 1\n",
            "is missing; did you mean 'num_epochs' by 'num_epoch'?",
        ),
        (FLOW + "log_freq: often\n", "other.yaml: log_freq: often was given, an integer is"),
        (FLOW + "indices: 3\n", "other.yaml: indices: 3 was given, a mapping is expected"),
        (FLOW + "hook: {active: 3}\n", "hook.active: 3 was given, true or false is expected"),
        (FLOW + "log_freq: ${note}\n", "log_freq: text was given, an integer is expected"),
        (FLOW + "log_freq: '{note}'\n", "log_freq: text was given, an integer is expected"),
        (FLOW + "log_freq: '{nothing}'\n", 'log_freq: "{nothing}" was given, an integer is'),
        (FLOW + "other: ${nothing}\n", "${nothing} refers to a key that is not there"),
        (FLOW + "other: '{other}'\n", "the references other -> other form a circle"),
        (FLOW + "stages: {1.5: x}\n", "stages: the key 1.5 is not a word"),
    ],
)
def test_what_the_engine_needs_is_checked(flow: Flow, content: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)) as refused:
        flow(content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("model_pars/depth", "5", 5),
        ("model_pars.depth", "5", 5),
        ("depth", "5", 5),
        ("batch_size", "5", 5),
        ("learning_rate", "1", 1.0),
        ("note", "5", "5"),
        ("indices/train", "[1]", [1]),
        ("indices", "{train: [1]}", {"train": [1]}),
        ("log_freq", "{batch_size}", 16),
        ("note", "{model_pars/depth}", 3),
        ("note", "${model_pars/depth}", 3),
    ],
)
def test_overrides_of_such_a_config(flow: Flow, key: str, text: str, expected: Any) -> None:
    path = "model_pars.depth" if key == "depth" else key.replace("/", ".")
    value = value_at(flow(FLOW, Override(key, text)), path)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "key, text, sentence",
    [
        ("model_pars/dept", "5", "unknown key 'model_pars/dept'; did you mean 'model_pars.depth'?"),
        ("new", "5", "unknown key 'new'"),
        ("model_pars/depth", "deep", "model_pars.depth: deep was given, an integer is expected"),
        ("model_pars", "{new: 1}", "unknown key 'model_pars.new'"),
        ("log_freq", "often", "log_freq: often was given, an integer is expected"),
        ("parts", "3", "model_pars.parts: 3 was given, a list is expected"),
        ("parts", "3,4", "model_pars.parts: 3,4 is not computed; write the"),
        ("indices/train", "[None, 1]", "indices.train: [None, 1] is not computed"),
        ("note", "(1, 2)", "note: (1, 2) is not computed"),
        ("note", "None", "note: null was given, text is expected"),
    ],
)
def test_a_wrong_override_of_such_a_config(flow: Flow, key: str, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        flow(FLOW, Override(key, text))


def test_an_override_may_add_a_key_where_the_kind_allows_it(
    flow: Flow, flows: ConfigRegistry
) -> None:
    def added(key: str, text: str, raw: bool = False) -> Any:
        return flow(FLOW, Override(key, text, raw, adds=True))

    assert added("new/deep.key", "1e-4")["new"] == {"deep": {"key": 1e-4}}
    assert added("model_pars/width", "7")["model_pars"]["width"] == 7
    assert added("model_pars", "{width: 7}")["model_pars"]["depth"] == 3
    assert added("new", "[1]", raw=True)["new"] == "[1]"
    assert added("stages", "{1: {end: 2}}")["stages"] == {"1": {"end": 2}}
    for key, sentence in [
        ("note/deep", "note: .* was given, text is expected"),
        ("model_pars/parts/0", "model_pars.parts: .* was given, a list is expected"),
        ("new//key", "the key '' is not a word"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            added(key, "1")
    with pytest.raises(UsageError, match="unknown key 'new'"):
        flows.resolve("root", overrides=[Override("new", "1", adds=True)])


def test_one_text_may_stand_where_a_file_has_a_list(flow: Flow) -> None:
    one = Override("model_pars.parts", "data/train-*", adds=True)
    assert flow(FLOW, one)["model_pars"]["parts"] == "data/train-*"
    with pytest.raises(UsageError, match=r"model_pars\.parts: 3 was given, a list is expected"):
        flow(FLOW, Override("model_pars.parts", "3", adds=True))


def test_a_key_can_be_deleted(flow: Flow) -> None:
    def less(*keys: str) -> dict[str, Any]:
        overrides = [Override(key, None, deletes=True) for key in keys]
        return flow(FLOW, *overrides)

    assert less("model_pars/depth")["model_pars"] == {"active": True, "parts": ["a", "b"]}
    assert "model_pars" not in less("model_pars", "model_pars.depth")
    assert less("learning_rate")["learning_rate"] == 0.1, "one of the schema gets its default"
    with pytest.raises(UsageError, match="unknown key 'nots'; did you mean 'note'"):
        less("nots")
    with pytest.raises(UsageError, match="the key 'iterator' is missing"):
        less("iterator")


def test_of_files_that_extend_the_same_one_each_counts(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{a: {x: base, y: base}, b: base}")
    (tmp_path / "first.yaml").write_text("{extend: base.yaml, a: {x: first}}")
    (tmp_path / "second.yaml").write_text("{extend: base.yaml, b: second}")
    (tmp_path / "own.yaml").write_text("{extend: [first.yaml, second.yaml], c: own}")
    config = load_file(tmp_path / "own.yaml")
    assert config == {"a": {"x": "first", "y": "base"}, "b": "second", "c": "own"}


def test_a_file_can_delete_what_it_extends(registry: ConfigRegistry, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{n_filters: 8, model: {width: 5, depth: 3}}")
    (tmp_path / "own.yaml").write_text("{extend: base.yaml, delete: [model/width, n_filters]}")
    config = registry.resolve(str(tmp_path / "own.yaml"))
    root = registry.get_root_config()
    assert config["n_filters"] == root["n_filters"]
    assert config["model"] == {**root["model"], "depth": 3}
    (tmp_path / "own.yaml").write_text("{extend: base.yaml, delete: n_filter}")
    sentence = "no extended file has 'n_filter' to delete; did you mean 'n_filters'?"
    with pytest.raises(UsageError, match=sentence):
        registry.resolve(str(tmp_path / "own.yaml"))


def test_references_in_braces_and_with_slashes(flow: Flow) -> None:
    config = flow(
        FLOW + "a: '{model_pars/depth}'\nb: '{model_pars}'\nc: '{nothing/here}'\nd: 'x{note}'\n"
        "e: ${model_pars/depth}\nf: ['{batch_size}']\ng: 'of ${model_pars/depth}'\nh: ${later}\n",
        Override("model_pars/depth", "5"),
        Override("later", "9", adds=True),
    )
    assert [config[key] for key in "acdefgh"] == [
        5, "{nothing/here}", "x{note}", 5, [16], "of 5", 9,
    ]  # fmt: skip
    assert config["b"] == {"depth": 5, "active": True, "parts": ["a", "b"]}


def test_slashes_serve_root_too_but_braces_do_not(registry: ConfigRegistry) -> None:
    config = with_overrides(registry, ("model/depth", "5"), ("weights", "${model/depth}"))
    assert config["model"]["depth"] == config["weights"] == 5
    assert with_overrides(registry, ("optimizer", "'{n_filters}'"))["optimizer"] == "{n_filters}"


def test_whole_numbers_become_keys_that_are_text(flow: Flow) -> None:
    stages = "stages: {1: {end: 10}, 2: {end: 20}}\n"
    config = flow(FLOW + stages, Override("stages/1/end", "15"))
    assert config["stages"] == {"1": {"end": 15}, "2": {"end": 20}}
    with pytest.raises(UsageError, match="unknown key 'stages'"):
        flow(stages)


def test_a_resolved_config_belongs_to_its_kind_again(flow: Flow, flows: ConfigRegistry) -> None:
    for content in (FLOW + "stages: {1: '{note}'}\n", "variant: b\n"):
        config = flow(content)
        assert flow(json.dumps(config)) == config
        older = {key: value for key, value in config.items() if key != "log_freq"}
        assert flows.completed(older) == config
    completed = flows.completed({"iterator": "a.B"})
    completed["hook"]["op"] = "changed"
    assert flows.completed({"iterator": "a.B"})["hook"]["op"] == "validation/op"
    assert flows.completed({}) == flows.get_root_config()


def test_schemas_without_root(tmp_path: Path) -> None:
    registry = ConfigRegistry()
    registry.add_schema({"iterator": None, "rate": 0.1})
    (tmp_path / "flow.yaml").write_text("rate: 1\nown: 2\n")
    config = registry.resolve(str(tmp_path / "flow.yaml"))
    assert config == {"iterator": None, "rate": 1.0, "own": 2}
    (tmp_path / "flow.yaml").write_text("own: 2\n")
    assert registry.resolve(str(tmp_path / "flow.yaml")) == {"own": 2}


@pytest.fixture
def with_rates() -> ConfigRegistry:
    """A registry with two keys of which one takes the place of the other."""
    registry = ConfigRegistry()
    registry.set_root_config(
        {
            "rate": Key(None, "one rate", instead_of="schedule"),
            "schedule": Key(None, "several", instead_of="rate"),
        }
    )
    registry["falling"] = {"schedule": [[1, 0.1]]}
    registry["fixed"] = {"rate": 0.2}
    return registry


def test_a_typed_key_takes_the_place_of_another(with_rates: ConfigRegistry) -> None:
    typed = [Override("rate", "0.3")]
    assert with_rates.resolve("falling", overrides=typed) == {"rate": 0.3, "schedule": None}
    typed = [Override("schedule", "[[2, 0.1]]")]
    assert with_rates.resolve("fixed", overrides=typed) == {"rate": None, "schedule": [[2, 0.1]]}
    typed = [Override("rate", "0.3"), Override("schedule", "null")]
    assert with_rates.resolve("falling", overrides=typed) == {"rate": 0.3, "schedule": None}


def test_two_keys_that_exclude_each_other_are_not_both_typed(with_rates: ConfigRegistry) -> None:
    typed = [Override("rate", "0.3"), Override("schedule", "[[2, 0.1]]")]
    with pytest.raises(UsageError, match="rate and schedule exclude each other"):
        with_rates.resolve("root", overrides=typed)


# ------------------------------------------------------------------------- files of metayaml's time


@pytest.fixture
def variants() -> ConfigRegistry:
    registry = ConfigRegistry()
    registry.set_root_config({"width": 1})
    registry.add_schema({"train": {}, "threads": None}, is_metayaml=True)
    return registry


def test_words_are_values_in_a_variant_and_in_all_that_it_extends(
    variants: ConfigRegistry, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(
        "own: {a: no, b: 'no', c: On, d: None, e: [OFF, y], f: 08}\n"
    )
    (tmp_path / "variant.yaml").write_text("extend: base.yaml\ntrain: {shuffle: yes}\n")
    config = variants.resolve(str(tmp_path / "variant.yaml"))
    own = {"a": False, "b": "no", "c": True, "d": None, "e": [False, "y"], "f": 8}
    assert config == {"train": {"shuffle": True}, "threads": None, "own": own}
    assert load_file(tmp_path / "base.yaml")["own"]["a"] == "no", "of another kind it is a word"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("train: {a: $(train.b)}", r"'$(train.b)' is not computed; write ${a.b} for"),
        ("train: {a: '${1024 * 2}'}", "'${1024 * 2}' is not computed"),
        ("""train: {a: "${cp(b, c={'d': 1})}"}""", "is not computed"),
        ("train: {a: 'x $(b) y'}", "is not computed"),
        (
            "train: {a: {'${__extend__}': [b]}}",
            "__extend__ is not known here; write extend: [files]",
        ),
        ("train: {'${__inherit__}': b}", "__inherit__ is not known here; write out the keys"),
        ("train: {a: '${__del__}'}", "__del__ is not known here; write delete: [a.b]"),
        ("own: {'${__del_all__}': [a]}", "__del_all__ is not known here"),
        ("width: 2\n'${__del__}': a", "__del__ is not known here"),
        ("width: {'$(a)': 2}", "'$(a)' is not computed"),
        ("train: {mode: 0644}", "is 0644 a number or text? Write it out, or quote it"),
        ("train: {at: 12:30}", "is 12:30 a number or text?"),
        ("train: {rate: 1:3:0.01}", "is 1:3:0.01 a number or text?"),
    ],
)
def test_what_metayaml_would_have_computed_is_refused(
    variants: ConfigRegistry, tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "variant.yaml"
    file.write_text(text + "\n")
    with pytest.raises(UsageError, match=re.escape(sentence)) as refusal:
        variants.resolve(str(file))
    assert str(refusal.value).startswith(str(file))


def test_what_is_typed_for_a_variant_is_not_computed_either(
    variants: ConfigRegistry, tmp_path: Path
) -> None:
    (tmp_path / "variant.yaml").write_text("train: {a: 1, b: {c: '${train.a}'}}\n")

    def resolved(value: str, raw: bool = False) -> Any:
        override = Override("train.new", value, raw=raw, adds=True)
        return variants.resolve(str(tmp_path / "variant.yaml"), overrides=[override])["train"][
            "new"
        ]

    assert resolved("${train.b.c}") == 1
    merged = Override("train", "{a: 2, new: 3}", adds=True)
    config = variants.resolve(str(tmp_path / "variant.yaml"), overrides=[merged])
    assert config["train"] == {"a": 2, "b": {"c": 2}, "new": 3}, "as Deephub merged it"
    assert resolved("$(train.a)", raw=True) == "$(train.a)"
    computed = ("12/3.0", "(1, 2)", "3,4", "2*(3+4)", "10-2", "1e-3*2", "[1, 2*3]", "{'a': (1, 2)}")
    others = ("[None, 1]", "not True", "max(1, 2)", "[x for x in range(3)]", "1 if True else 2")
    for value in ("$(train.a)", *computed, *others):
        with pytest.raises(UsageError, match=r"^train\.new: .* is not computed"):
            resolved(value)
    for value in ("2026-10-11", "a/b", "data/train-*", "10.0.0.1", "min", "a - b"):
        assert resolved(value) == value
    assert resolved("10-2", raw=True) == "10-2"
    assert resolved("None") is None
    assert resolved("[True, {'a': 1e-3}]") == [True, {"a": 0.001}]
