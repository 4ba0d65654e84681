"""Every file of conf/ composes, validates and trains; every senseless value is refused in one
sentence.
"""

import copy
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from short_runs import composed, one_sentence, small_overrides

from mat.suite import engine
from mat.suite.compose import CONF, describe_groups, explain, quote_paths, resolve
from mat.suite.config import GROUPS, Config, MethodConfig
from mat.suite.errors import UserError
from mat.suite.glance import read_config
from mat.suite.science import differences, folder_of


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def sweep_of(experiment: str) -> dict[str, str]:
    """What ``-m +experiment=...`` sweeps over."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        full = loader.load_configuration("config", [f"+experiment={experiment}"], RunMode.MULTIRUN)
    return dict(full.hydra.sweeper.params)


# The controls read the MAT runs of a table's experiment, so that one comes first in its folder.
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_takes_steps_with_every_method_it_sweeps(experiment, tmp_path, cache):
    methods = ["mat", *sweep_of(experiment)["method"].split(",")]
    for method in dict.fromkeys(methods):
        asked = [f"+experiment={experiment}", f"method={method}", "seed=3"]
        modality = composed(*asked).dataset.modality
        small = small_overrides(cache, f"runs={tmp_path}", steps=6, modality=modality)
        config = resolve(composed(*asked, *small))
        summary = engine.run(config, folder_of(config, asked))
        assert summary is not None and summary["steps"] >= 2 and summary["method"] == method
    assert len(list(tmp_path.rglob("summary.json"))) == len(set(methods))


def test_every_method_is_in_an_experiment():
    """So that the test above takes steps with it."""
    assert {m for e in options("experiment") for m in sweep_of(e)["method"].split(",")} == set(
        options("method")
    )


FAMILIES = (  # a model with what suits it; these options suit no other
    ("model=vgg16_mini", "dataset=digits", "selection=filters_mini"),
    ("model=switch_mini", "selection=experts_mini"),
)
SUITS = {
    **dict.fromkeys(("model=vgg16", "dataset=cifar10", "selection=filters"), FAMILIES[0]),
    **dict.fromkeys(("model=switch", "selection=experts"), FAMILIES[1]),
    **{choice: family for family in FAMILIES for choice in family},
}


def beside(choice: str) -> list[str]:
    """What other groups must say for an option to make sense."""
    return [
        other
        for other in SUITS.get(choice, ())
        if other.partition("=")[0] != choice.partition("=")[0]
    ]


@pytest.mark.parametrize(
    "choice",
    [f"{group}={name}" for group in GROUPS for name in options(group) if name != "rand_matched"],
)
def test_every_option_composes_to_its_dataclass_and_validates(choice):
    config = resolve(composed(*beside(choice), choice))
    group, _, name = choice.partition("=")
    assert type(getattr(config, group)) in [node for _, node in GROUPS[group]]
    assert getattr(getattr(config, group), "name", name) == name


def test_experiments_set_the_folder_and_tables_sweep_three_seeds():
    for experiment in options("experiment"):
        config = resolve(composed(f"+experiment={experiment}"))
        if experiment.startswith("figure"):  # one run is enough, and figures share it
            assert config.name in options("experiment")
            continue
        # Controls stand beside the runs they read
        assert config.name == experiment.replace("_controls", "")
        assert len(set(sweep_of(experiment)["seed"].split(","))) >= 3


COMMITTED = {  # a run for every experiment: composing takes its time
    path.parts[-3]: path
    for path in sorted((CONF.parent / "results" / "runs").glob("[tf]*_mini/*/seed=*"))
}


@pytest.mark.parametrize("run", COMMITTED.values(), ids=COMMITTED.keys())
def test_a_committed_run_is_what_its_command_makes_today(run):
    overrides = shlex.split(json.loads((run / "environment.json").read_text())["command"])[2:]
    overrides = [o for o in overrides if not o.startswith(("runs=", "dataset.root="))]
    config = resolve(composed(*overrides))
    assert folder_of(config, overrides).parts[1:] == run.parts[-3:]
    other = differences(read_config(run), dataclasses.asdict(config))
    assert not {
        key for key in other if not key.startswith("hardware.") or key == "hardware.precision"
    }


def test_paper_marks_follow_the_length():
    train = resolve(composed("train=full")).train
    assert train.marks == pytest.approx([10, 15, 20]) and train.pflops == 28.7
    assert resolve(composed("train=full", "train.pflops=2.87")).train.marks == pytest.approx(
        [1, 1.5, 2]
    )


def test_table_2_is_read_at_the_papers_shares_of_the_length():
    full, mini = (resolve(composed(f"+experiment=table2{suffix}")) for suffix in ("", "_mini"))
    assert full.train.marks == pytest.approx([200, 400, 600]) and full.dataset.name == "wikitext103"
    assert mini.train.marks == pytest.approx(
        [mini.train.pflops * mark / 1155.2 for mark in (200, 400, 600)]
    )
    assert mini.dataset.name == "enwiki2015"


def test_table_3_is_the_papers_setting():
    config = resolve(composed("+experiment=table3"))
    assert config.train.pflops == pytest.approx(182 * 0.0938, rel=1e-3)
    assert (config.selection.mode, config.train.optimiser, config.train.schedule) == (
        "exact",
        "sgd",
        "step",
    )
    assert (config.train.momentum, config.train.weight_decay, config.train.batch) == (
        0.9,
        5e-4,
        128,
    )


def test_data_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MAT_DATA", str(tmp_path))
    assert resolve(composed("dataset=wikitext2")).dataset.root == str(tmp_path)
    monkeypatch.delenv("MAT_DATA")
    assert resolve(composed("dataset=wikitext2")).dataset.root is None


def test_help_describes_every_option():
    text = describe_groups(CONF)
    for group in (*GROUPS, "experiment"):
        assert group in text.splitlines()
        assert all(f"  {name}" in text for name in options(group))
    assert "schema_" not in text and "$" not in text.replace("$$", "")


# --- what composes but makes no sense

REFUSED = [  # overrides, a part of the sentence
    ("model.family=vgg", "model.family=vgg contradicts model=bert_mini"),
    ("hardware.graphs=true", "hardware.graphs=true captures CUDA graphs"),
    ("hardware.estimator_bytes=0", "hardware.estimator_bytes=0"),
    ("dataset.modality=image", "dataset.modality=image contradicts dataset=pydocs"),
    ("seed=-1", "seed=-1"),
    ("model.layers=0", "model.layers=0"),
    ("model.width=-8", "model.width=-8"),
    ("model.heads=3", "model.heads=3 does not divide model.width=128"),
    ("model.heads=128", "choose heads so that model.width / model.heads is even"),
    ("model.ffn_groups=7", "model.ffn_groups=7 does not divide model.ffn_hidden=512"),
    ("model.positions=rotory", "did you mean rotary?"),
    ("model.norm=middle", "choose one of post, pre"),
    ("model.dropout=0.95", "model.dropout=0.95"),
    ("dataset.length=1", "dataset.length=1"),
    ("dataset.vocabulary=63", "dataset.vocabulary=63"),
    ("dataset.vocabulary=70000", "[64, 65536]"),
    ("dataset.mask_share=0", "dataset.mask_share=0"),
    ("dataset.root=/nowhere/at/all", "MAT_DATA"),
    ("dataset.hub_path=a/b dataset.root=/", "dataset.local_folder=null"),
    ("train.pflops=0 train.marks=[]", "train.pflops=0"),
    ("train.pflops=.inf train.marks=[]", "train.pflops=inf"),
    ("train.pflops=.nan train.marks=[]", "train.pflops=nan"),
    ("train.batch=0", "train.batch=0"),
    ("train.accumulation=3", "train.accumulation=3 does not divide train.batch=16"),
    ("train.lr=0", "train.lr=0"),
    ("train.lr=.inf", "(0, inf)"),
    ("train.betas=[0.9]", "train.betas"),
    ("train.betas=[0.9,1.0]", "two numbers within [0, 1)"),
    ("train.eps=0", "train.eps=0"),
    ("train.weight_decay=-1", "train.weight_decay=-1"),
    ("train.warmup=1", "train.warmup=1"),
    ("train.clip=0", "train.clip=0"),
    ("train.eval_interval=0.05", "train.eval_interval=0.05"),
    ("train.eval_samples=0", "train.eval_samples=0"),
    ("train.eval_batch=0", "train.eval_batch=0"),
    ("train.marks=[1.0]", "train.marks=1.0"),
    ("method.budget=0.5", "method.budget=0.5 of train.pflops=0.003"),
    ("train.eval_interval=1e-9", "train.eval_interval=1e-09"),
    ("selection.interval=1e-9", "selection.interval=1e-09"),
    ("selection.units=[heads,heads]", "names a kind twice"),
    ("train.drops=[0.75,0.5]", "does not rise"),
    ("model.width=100000000", "model.width=100000000"),
    ("model.layers=100000000", "model.layers=100000000"),
    ("train.batch=100000000", "train.batch=100000000"),
    ("name=../up", "name='../up'"),
    ("name=/tmp/x", "name='/tmp/x'"),
    ("name=a/b", "name='a/b'"),
    ("name=''", "name=''"),
    ("name=..", "name='..'"),
    (f"name={'x' * 101}", "up to 100"),
    ("runs=''", "runs=''"),
    ("dataset.cache=''", "dataset.cache=''"),
    ("train.log_steps=0", "train.log_steps=0"),
    ("train.checkpoint_steps=0", "train.checkpoint_steps=0"),
    ("selection.units=[heads,fnn]", "did you mean ffn?"),
    (
        "selection.units=[heads,experts]",
        "selection.units=experts is none of model=bert_mini: add selection=mini",
    ),
    ("selection.units=[]", "method=baseline"),
    ("selection.interval=0.1", "selection.interval=0.1"),
    ("selection.mode=dense", "choose one of cut, exact"),
    ("selection.share=1.5", "selection.share=1.5"),
    ("selection.share=null", "exactly one of them"),
    ("selection.alpha=0.5", "exactly one of them"),
    ("selection.share=null selection.alpha=2", "selection.alpha=2"),
    ("selection.scope=layers", "did you mean layer?"),
    ("selection.beta=-1", "selection.beta=-1"),
    ("selection.samples=0", "selection.samples=0"),
    ("selection.reduction=mean", "selection.reduction=mean"),
    ("selection.projections=0", "selection.projections=0"),
    ("method.policy=top", "method.policy=top"),
    ("method.score=lambda", "did you mean lambda_max?"),
    ("method.score=none method.temporal=false", "method.policy=threshold"),
    ("method.score=gradnorm", "method.temporal=true needs eigenvalues"),
    ("method.budget=0", "method.budget=0"),
    ("method.budget=1.1", "method.budget=1.1"),
    ("method.matched=runs/x", "method=rand only"),
    ("method.policy=random selection.share=null selection.alpha=0.5", "set selection.share"),
    ("method.slow_share=2", "method.slow_share=2"),
    ("method.slow_steps=0", "method.slow_steps=0"),
    ("hardware.device=tpu", "did you mean cpu?"),
    ("hardware.precision=float16", "did you mean bfloat16?"),
    ("hardware.threads=0", "hardware.threads=0"),
    ("hardware.estimator_bytes=1", "hardware.estimator_bytes=1"),
    ("dataset.root=${no.such.key}", "dataset.root"),
    ("dataset.name=../up", "dataset.name='../up' is no name"),
    ("dataset.cache=''", "dataset.cache"),
    ("dataset.name=''", "dataset.name='' is no name"),
]


REFUSED_OF_IMAGES = [
    ("selection.reduction=online", "which its forward pass couples: choose random"),
    ("model.stages=[]", "model.stages=[]"),
    ("model.stages=[[8],[]]", "model.stages=[[8], []]"),
    ("model.stages=[[8],[0]]", "model.stages=0"),
    ("dataset.size=16", "too few pixels"),
    ("dataset.source_size=0", "dataset.source_size=0"),
    ("dataset.size=0", "dataset.size=0"),
    ("dataset.channels=4", "set 3, or 1 for grey"),
    ("dataset.classes=1", "dataset.classes=1"),
    ("dataset.classes=1000000000", "dataset.classes=1000000000"),
    ("dataset.size=100000", "dataset.size=100000"),
    ("dataset.validation=0", "dataset.validation=0"),
    ("dataset.padding=-1", "dataset.padding=-1"),
    ("dataset.padding=33", "dataset.padding=33"),
    ("selection.units=[filter]", "did you mean filters?"),
    (
        "selection.units=[heads]",
        "selection.units=heads is none of model=vgg16_mini: add selection=filters_mini train",
    ),
    ("analysis=[descent]", "leave it out for model=vgg"),
    ("analysis=[attention]", "leave it out for model=vgg"),
    ("selection.reduction=online", "selection.reduction=online"),
]


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return composed()


@pytest.fixture(scope="module")
def images() -> DictConfig:
    return composed(*FAMILIES[0])


@pytest.mark.parametrize(
    ("family", "overrides", "part"),
    [
        *(("default", *refused) for refused in REFUSED),
        *(("images", *refused) for refused in REFUSED_OF_IMAGES),
    ],
)
def test_senseless_values_are_refused_in_one_sentence(family, overrides, part, request):
    changed = OmegaConf.merge(
        copy.deepcopy(request.getfixturevalue(family)), OmegaConf.from_dotlist(overrides.split())
    )
    with pytest.raises(UserError) as caught:
        resolve(changed)
    message = str(caught.value)
    assert part in message and one_sentence(message), message
    key = overrides.split()[0].partition("=")[0]
    assert key in message or key.partition(".")[0] in message, message


def test_the_text_defaults_do_not_train_images():
    with pytest.raises(UserError, match="add selection=filters_mini train=images_mini"):
        resolve(composed("model=vgg16_mini", "dataset=digits"))
    resolve(
        composed(
            "model=vgg16_mini", "dataset=digits", "selection=filters_mini", "train=images_mini"
        )
    )


def test_switch_without_a_gated_expert_is_refused():
    with pytest.raises(UserError, match="add selection=experts_mini"):
        resolve(composed("model=switch_mini"))


def test_matched_without_a_run_to_match_is_refused():
    with pytest.raises(UserError, match="no run to match"):
        resolve(composed("method=rand_matched", "method.matched=null"))


@pytest.mark.parametrize(
    ("key", "value"), [("name", "a\nb"), ("runs", "a\nb"), ("dataset.cache", "a\0b")]
)
def test_line_breaks_in_names_are_refused(key, value, default):
    changed = copy.deepcopy(default)
    OmegaConf.update(changed, key, value)
    with pytest.raises(UserError, match=key) as caught:
        resolve(changed)
    assert one_sentence(str(caught.value))


PASTED = "runs/table1_mini/method=mat,model=bert/seed=0"


@pytest.mark.parametrize(("argument", "quoted"), [
    (f"method.matched={PASTED}", f"method.matched='{PASTED}'"),
    (f"method.matched='{PASTED}'", f"method.matched='{PASTED}'"),
    ("runs=a,b", "runs=a,b"), ("method.matched=${runs}/a=b", "method.matched=${runs}/a=b"),
])  # fmt: skip
def test_a_pasted_path_is_quoted(argument, quoted):
    assert quote_paths([argument]) == [quoted]


def test_every_number_has_bounds():
    """No key with a number accepts both -1e30 and nan: a new key needs a check of its own."""
    unbounded, seen = [], set()
    for family in ((), *FAMILIES):
        base = composed(*family)
        for group in GROUPS:
            node = OmegaConf.get_type(base[group])
            for field in dataclasses.fields(node) if node not in seen else ():
                if field.type in (int, float) and field.name != "projections":
                    changed = copy.deepcopy(base)
                    OmegaConf.update(changed, f"{group}.{field.name}", -(10**30))
                    try:
                        resolve(changed)
                    except UserError as error:
                        assert one_sentence(str(error)), error
                    else:
                        unbounded.append(f"{group}.{field.name}")
            seen.add(node)
    assert unbounded == [] and seen == {node for schemas in GROUPS.values() for _, node in schemas}


# --- what Hydra itself refuses

UNCOMPOSABLE = [
    ("model.widht=3", "model.widht is not a key: did you mean model.width?"),
    ("trian.lr=1", "trian.lr is not a key: did you mean train.lr?"),
    ("lr=3", "lr is not a key: did you mean train.lr?"),
    ("nonsense=3", "nonsense is not a key: python launch.py --help shows them."),
    ("+model.widht=3", "model.widht is not a key: did you mean model.width?"),
    ("+foo=1", "foo is not a key: python launch.py --help shows them."),
    ("++train.rate=1", "train.rate is not a key"),
    ("model=brt", "model=brt is not known: did you mean model=bert?"),
    ("method=adamw", "method=adamw is not known: choose one of baseline,"),
    ("+experiment=tabel1", "experiment=tabel1 is not known: did you mean experiment=table1?"),
    ("experiment=table1_mini", "write +experiment=table1_mini with a plus sign"),
    ("+model=bert", "write model=... without a plus sign"),
    ("+model.width=3", "write model.width=... without a plus sign"),
    ("train.lr=abc", "train.lr=abc has the wrong type: give train.lr a number."),
    ("model.width=1.5", "give model.width a whole number."),
    ("tracking.wandb=maybe", "give tracking.wandb true or false."),
    ("train.eval_samples=x", "give train.eval_samples a whole number or null."),
    ("selection.units=heads", "give selection.units a list, as in [a, b]."),
    ("train.betas=[a,b]", "give train.betas a list of numbers"),
    ("seed=null", "give seed a whole number."),
    ("train=null", "a group wants the name of one of its options"),
    ("seed=1,2", "add -m"),
    ("train.lr=[1", "train.lr=[1 cannot be read: write key=value"),
    ("train.lr", "train.lr cannot be read: write key=value"),
    ("method.name=???", "method.name has no value: set it"),
    ("~method", "method has no value: set it"),
    ("~foo", "'foo'"),
]


@pytest.mark.parametrize(("override", "sentence"), UNCOMPOSABLE)
def test_what_does_not_compose_is_explained_in_one_sentence(override, sentence):
    with pytest.raises(Exception) as caught:
        resolve(composed(override))
    message = str(caught.value) if isinstance(caught.value, UserError) else explain(caught.value)
    assert message is not None and sentence in message and one_sentence(message), message
    assert "schema_" not in message


def test_other_errors_are_not_explained_away():
    assert explain(ValueError("a bug")) is None and explain(KeyError("model")) is None


# --- names of run folders

NAMED = [
    ([], "default"),
    (
        [
            "seed=3",
            "runs=/x",
            "hardware=cuda",
            "hardware.threads=1",
            "tracking=wandb",
            "tracking.entity=e",
        ],
        "default",
    ),
    (
        [
            "dataset.root=/data",
            "dataset.cache=/c",
            "train.checkpoint_steps=5",
            "+experiment=table1",
        ],
        "default",
    ),
    (["model=bert", "method=mat", "seed=1"], "method=mat,model=bert"),
    (
        ["method.matched='a/b/seed=7'", "hardware.precision=float32"],
        "hardware.precision=float32,method.matched=a_b",
    ),
    (["hardware.precision=auto"], "default"),
    (["+dataset.name=a/b"], "dataset.name=a_b"),
    (["dataset=pydocs", "seedling=1"], "dataset=pydocs,seedling=1"),
]


@pytest.mark.parametrize(("overrides", "name"), NAMED)
def test_a_folder_is_named_by_what_changes_the_science(overrides, name):
    config = Config(name="n", seed=7, runs="r", method=MethodConfig(matched="a/b/seed=7"))
    assert folder_of(config, overrides) == Path("r") / "n" / name / "seed=7"


@pytest.mark.parametrize("written", ["train.lr=2e-3", "train.lr=0.002", "train.lr=0.20e-2"])
def test_a_value_names_the_same_folder_however_it_is_written(written):
    config = resolve(composed(written, "selection.units=[heads, ffn]"))
    folder = folder_of(config, [written, "selection.units=[heads, ffn]"])
    assert folder.parent.name == "selection.units=[heads,ffn],train.lr=0.002"


def test_long_names_stay_distinct_and_within_the_file_system():
    long = [[f"train.lr={i}", *(f"model.key{k}=value" for k in range(40))] for i in range(2)]
    names = [folder_of(Config(), overrides).parent.name for overrides in long]
    assert names[0] != names[1] and max(len(name.encode()) for name in names) <= 200
