"""Recipes: every page constructs, every field is described, bad values are refused in one clear line."""

from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import pytest
import yaml

from cm_core.params import Params
from flows.errors import UserError
from flows.recipes.naming import active_name
from flows.recipes.recipe import (
    EDITED,
    Recipe,
    dump_recipe,
    explain,
    flatten,
    load_active,
    load_recipe,
    merge,
    parse_override,
    recipe_names,
    validate,
    vary,
    write_active,
)
from flows.workspace.dvc_files import read_stages
from miniature import REPOSITORY
from schemas import unions

ROOT = Path(__file__).parents[3]
TINY = "data: {source: digits}\nnetwork: {kind: song_unet, channels: 8, channel_mult: [1]}\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "params" / "recipes").mkdir(parents=True)
    (tmp_path / "params" / "recipes" / "tiny.yaml").write_text(TINY)
    return tmp_path


def sections(annotation):
    """Every Params class reachable from an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Params):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from sections(part)


ALL_SECTIONS = sorted(set(sections(Recipe)), key=lambda section: section.__name__)


@pytest.mark.parametrize("name", recipe_names(ROOT))
def test_every_page_constructs_and_says_what_to_expect(name):
    recipe = load_recipe(name, root=ROOT)
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert validate(recipe.model_dump(mode="json"), source=name) == recipe, "as a server hands it over"
    header = (ROOT / "params" / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"cm run {name}" in header and "Expected" in header or "expected" in header


def test_the_active_recipe_is_a_page_resolved():
    active = load_active(ROOT)
    assert active in [load_recipe(name, root=ROOT) for name in recipe_names(ROOT)]


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described(section):
    undescribed = [name for name, field in section.model_fields.items() if not field.description]
    assert not undescribed
    assert section.__doc__


def test_the_form_keeps_the_order_of_the_fields():
    schema = Recipe.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        positions = [field["position"] for field in definition.get("properties", {}).values()]
        assert positions == list(range(len(positions)))


def test_the_choices_of_a_union_differ_in_their_keys():
    """Prefect's pages tell by the keys of a value which tab it belongs to, and submit what that tab says."""
    schema = Recipe.model_json_schema()
    found = list(unions(schema))
    assert len(found) > 8
    for choices in found:
        keys = [frozenset(schema["$defs"][choice]["properties"]) for choice in choices]
        assert len(set(keys)) == len(keys), choices


def test_unions_are_tabs_with_titles():
    methods = Recipe.model_json_schema()["$defs"]["Student"]["properties"]["method"]["anyOf"]
    titles = [Recipe.model_json_schema()["$defs"][method["$ref"].rsplit("/", 1)[1]]["title"] for method in methods]
    assert {"cd", "ct"} <= set(titles)


REFUSED = [
    ("student.method.solverr=euler", "--set student.method.solverr", "did you mean solver?"),
    ("student.methd.s0=3", "--set student.methd", "did you mean method?"),
    ("student.train.optimizer=adam", "--set student.train.optimizer.learning_rate", "Field required"),
    ("student.method.num_scales=1", "--set student.method.num_scales=1", "greater than or equal to 2"),
    ("student.method.num_scales=many", "--set student.method.num_scales=many", "valid integer"),
    ("student.method.kind=foo", "--set student.method.kind=foo", "cd, ct"),
    ("student.method.solver=rk4", "--set student.method.solver=rk4", "'euler' or 'heun'"),
    ("noise.sigma_min=90", "--set noise", "sigma_min=90.0 must lie below sigma_max=80.0"),
    ("teacher=null", "--set teacher=null", "student.method.kind=cd distils a teacher, and teacher is null"),
    (
        "student.method.distance=lpips",
        "--set student.method.distance=lpips",
        "lpips needs RGB images of at least 16x16, got 1x8x8",
    ),
    ("network.channel_mult=[1,1,1,1,1]", "--set network.channel_mult=[1,1,1,1,1]", "halve the image 4 times"),
    ("student.train.save_every=30", "--set student.train", "save_every=30 must be a multiple of log_every=100"),
    ("sample.mid_sigmas=[[90]]", "--set sample.mid_sigmas=[[90]]", "must decrease and stay above sigma_min"),
    (
        "sample.teacher_sampler.guidance=2",
        "--set sample.teacher_sampler.guidance=2",
        "guidance=2 needs labels, and conditional is false",
    ),
    (
        "sample={weak_teacher: {weights: a.pkl}}",
        "--set sample",
        "weak_teacher has no effect with teacher_sampler.guidance=1",
    ),
    ("sample.weak_teacher.weights=https://example.org/a.pkl", "--set sample.weak_teacher", "needs its sha256"),
    ("edit.factor=3", "--set edit.factor=3", "edit.factor=3 does not divide images of 8x8 pixels"),
    ("edit.tasks=[paint]", "--set edit.tasks", "'inpaint', 'colorize'"),
    ("student=3", "--set student=3", "must be a section with keys weights"),
    ("teacher.train.emas=[]", "--set teacher.train.emas", "at least 1"),
    ("features=resnet", "--set features", "inception-v3-compat"),
    ("data.source=imagenet", "--set data.source", "digits, cifar10, array, images"),
    (
        "features={kind: dinov2, reference: a.npz}",
        "--set features={kind: dinov2, reference: a.npz}",
        "set evaluate.beside_fid to [is] or []",
    ),
    ("sample.emas=[0,1]", "--set sample.emas=[0,1]", "sample.emas=[0, 1]: student.train.emas has 1, counted from 0"),
    ("sample.emas=[]", "--set sample.emas", "at least 1"),
    ("student.train={schedule: inverse_sqrt}", "--set student.train", "needs schedule_start"),
    (
        "student.train={schedule: cosine, schedule_start: 9000000}",
        "--set student.train",
        "must lie below num_steps=400000",
    ),
    ("evaluate.repeats=3", "--set evaluate.repeats=3", "3 sets of 50000 images are sample.num_images=150000"),
    ("student={evaluate_every: 30}", "--set student", "evaluate_every=30 must be a multiple of train.log_every=100"),
    (
        "student.evaluate_mid_sigmas=[[90]]",
        "--set student.evaluate_mid_sigmas=[[90]]",
        "must decrease and stay above sigma_min",
    ),
    (
        "student={method: meanflow, init_from: teacher}",
        "--set student",
        "init_from=teacher: kind=meanflow trains a network of two times from scratch",
    ),
    (
        "student={method: dmd, train: {compile: true}}",
        "--set student",
        "trains two networks in turn, which is not tried",
    ),
    (
        "student.method={kind: dmd, generator_sigma: 0.001}",
        "--set student.method",
        "must decrease and stay above sigma_min",
    ),
    (
        "student.method={kind: dmd, u_min: 0.5, u_max: 0.4}",
        "--set student.method",
        "u_min=0.5 must lie below u_max=0.4",
    ),
    (
        "student.train.optimizer={kind: radam, learning_rate: 1, weight_decay: 0.1}",
        "--set student.train.optimizer",
        "weight_decay=0.1 needs kind: adam",
    ),
    ("colour=red", "--set colour", "unknown key"),
    ("seed", "--set seed", "expected key=value"),
    ("seed=[1", "--set seed=[1", "not a YAML value"),
]


@pytest.mark.parametrize("key", ["sample.teacher_sampler", "teacher.grid_sampler", "student.method"])
def test_guidance_needs_a_teacher_that_dropped_labels(root, key):
    guidance = ["conditional=true", f"{key}.guidance=1.5"]
    with pytest.raises(UserError, match=rf"{key}\.guidance=1\.5 needs a teacher.*label_dropout is 0"):
        load_recipe("tiny", guidance, root=root)
    assert load_recipe("tiny", [*guidance, "teacher.method.label_dropout=0.1"], root=root)


@pytest.mark.parametrize(("override", "place", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_bad_values_are_refused_in_one_line(root, override, place, reason):
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", [override], root=root)
    line = str(refused.value)
    assert line.startswith(place) and reason in line and "\n" not in line


def test_an_adversarial_loss_needs_a_unet(root):
    overrides = ["network=mlp", "student.method={kind: dmd, student_every: 2}"]
    with pytest.raises(UserError, match=r"gan_weight=0\.001 needs the features of a U-Net, and the network is an MLP"):
        load_recipe("tiny", overrides, root=root)
    assert load_recipe("tiny", [*overrides, "student.method.gan_weight=0"], root=root)


def test_distribution_matching_is_measured_by_precision_and_recall_too():
    with pytest.raises(UserError, match=r"beside_fid=\['is'\].*kind=dmd.*which FID hides; add precision_recall"):
        load_recipe("digits-dmd", ["evaluate.beside_fid=[is]"], root=ROOT)
    assert load_recipe("digits-cd", ["evaluate.beside_fid=[is]"], root=ROOT)
    statistics = ["features={kind: inception-v3-compat, reference: mu_sigma.npz}", "evaluate.beside_fid=[is]"]
    assert load_recipe("cifar10-dmd2", statistics, root=ROOT)  # of them nothing but FID and IS can be had


@pytest.mark.parametrize("name", [name for name in recipe_names(ROOT) if name.startswith(("imagenet", "lsun"))])
def test_paper_recipes_train_on_and_compare_with_all_images(name):
    """The digits and CIFAR-10 have a split of their own or are demonstrations."""
    assert load_recipe(name, root=ROOT).data.heldout_fraction == 0


def test_a_bad_page_is_named_with_its_key(root):
    page = root / "params" / "recipes" / "bad.yaml"
    page.write_text("student:\n  method: {kind: ct, s1: -3}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: student\.method\.s1=-3: must be greater than or equal to 2"):
        load_recipe("bad", root=root)
    with pytest.raises(UserError, match=r"bad\.yaml: student\.method\.s1=-3: must be"):  # not the --set beside it
        load_recipe("bad", ["seed=1"], root=root)
    page.write_text("student: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_recipe("bad", root=root)


def test_unknown_recipe_lists_what_there_is(root):
    with pytest.raises(UserError, match=r"no recipe 'tny' \(did you mean tiny\?\); there are tiny"):
        load_recipe("tny", root=root)


def test_overrides_are_laid_over_the_page(root):
    recipe = load_recipe(
        "tiny", ["student.method.solver=euler", "student.train.optimizer.learning_rate=1e-4"], root=root
    )
    assert recipe.student.method.solver == "euler"
    assert recipe.student.train.optimizer.learning_rate == 1e-4
    assert recipe.network.channels == 8


def test_another_kind_starts_its_section_afresh():
    base = {"method": {"kind": "cd", "solver": "euler", "distance": {"kind": "lpips", "pooling": "avg"}}}
    assert merge(base, parse_override("method.kind=ct")) == {"method": {"kind": "ct"}}
    assert merge(base, parse_override("method.distance=l2"))["method"]["distance"] == {"kind": "l2"}
    assert merge(base, parse_override("method.kind=cd")) == base
    assert merge({"a": "cd"}, parse_override("a.solver=heun")) == {"a": {"kind": "cd", "solver": "heun"}}


def test_resolved_values_say_where_they_come_from(root):
    rows = {key: (value, source) for key, value, source in explain("tiny", ["seed=4"], root=root)}
    assert rows["seed"] == (4, "--set")
    assert rows["network.channels"][0] == 8 and rows["network.channels"][1].endswith("tiny.yaml")
    assert rows["data.source.kind"][1].endswith("tiny.yaml")
    assert rows["noise.sigma_max"] == (80.0, "default")


TCM = ["base.method=ect", "student.method=tcm", "sample.mid_sigmas=[[], [1.0]]"]
UNFIT_BASES = [  # overrides after which a recipe of CD is refused, and why
    (["student.method=tcm"], "student.method.kind=tcm trains on from a consistency function, and base is null"),
    ([*TCM, "base.method=pd"], "base.method.kind=pd makes no consistency function"),
    ([*TCM, "base.method={kind: dmd, gan_weight: 0}"], "base.method.kind=dmd makes no consistency function"),
    ([*TCM, "base={method: meanflow}"], "the network of only one of them has two times"),
    ([*TCM, "base.method=tcm"], "base.method.kind=tcm needs a base itself; train base with ect, ict, cd or cmt"),
    ([*TCM, "base.method=ict"], "student.method.form=unshifted, and the base's is skip; set it to skip"),
    ([*TCM, "sample.mid_sigmas=[[], [0.8]]"], "sample.mid_sigmas: 0.8 lies below student.method.split=1"),
    ([*TCM, "student.evaluate_every=100"], "student.evaluate_mid_sigmas: 0.821 lies below student.method.split=1"),
    ([*TCM, "student.method.split=90"], "split=90 must lie between sigma_min=0.002 and sigma_max=80"),
    ([*TCM, "base.evaluate_every=100"], "base.evaluate_every=100: only the student's images are measured"),
    ([*TCM, "student.init_from=random"], "student.init_from=random, and the student starts from the base"),
    (["base.method=ect", "student.weights=a.pkl"], "student.weights is set: nothing is trained from the base"),
    (["base.method=cmt", "teacher=null"], "base.method.kind=cmt distils a teacher, and teacher is null"),
    (
        ["base.method=ect", "teacher=null", "student.method=ct"],
        "the base's initial weights are the teacher's (kind=ect)",
    ),
    (
        ["base={method: ect, init_from: random}", "teacher=null"],
        "student.method.kind=cd distils a teacher, and teacher is null",
    ),
    (["student.method=cmt", "student.train.batch_size=100"], "must be a multiple of method.num_steps=16"),
    (["base={method: {kind: cd, guidance: 2.0}}"], "base.method.guidance=2 needs labels, and conditional is false"),
    (["base={method: {kind: ect, distance: lpips}}"], "lpips needs RGB images of at least 16x16, got 1x8x8"),
]


@pytest.mark.parametrize(("overrides", "reason"), UNFIT_BASES)
def test_a_base_that_does_not_fit_is_refused_in_one_line(root, overrides, reason):
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", overrides, root=root)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        TCM,
        [*TCM, "base.method=ict", "student.method.form=skip", "teacher=null"],
        [*TCM, "base.weights=a.pkl", "teacher=null"],
        ["base.method=cmt", "student.method=ect", "student.init_from=null"],
        ["base={method: {kind: cd, form: piecewise}}", "student.method=scm"],
        ["base={method: meanflow}", "student.method=meanflow"],
        ["student={method: tcm, weights: a.pkl}", "sample.mid_sigmas=[[], [1.0]]", "teacher=null"],
        ["base={method: dmd}", "base.method.gan_weight=0", "student.method=ect"],
    ],
)
def test_a_base_that_fits_is_read_and_written(root, overrides):
    recipe = load_recipe("tiny", overrides, root=root)
    write_active(recipe, root)
    assert load_active(root) == recipe


def test_a_recipe_without_base_is_as_it_was(root):
    """What enters the keys of its stages: the sections, of which none but `base` knows of it."""
    recipe = load_recipe("tiny", root=root)
    assert recipe.base is None and recipe.model_dump(mode="json")["base"] is None
    assert "base" not in (root / "params/recipes/tiny.yaml").read_text()
    fields = "weights sha256 drop_classes method init_from dropout dropout_resolution evaluate_every evaluate_images"
    assert recipe.student.model_dump().keys() == {*fields.split(), "evaluate_mid_sigmas", "train"}
    declared = read_stages(REPOSITORY)
    assert [name for name, stage in declared.items() if "base" in stage.params] == ["base"]


def test_a_local_checkpoint_of_a_base_is_pinned_and_absolute(root):
    (root / "a.pkl").write_bytes(b"weights")
    recipe = load_recipe("tiny", [*TCM, "base.weights=a.pkl"], root=root, base=root)
    assert (recipe.base.weights, len(recipe.base.sha256)) == (str(root / "a.pkl"), 64)


def test_active_recipe_round_trips(root):
    recipe = load_recipe("tiny", ["teacher=null", "student.method.kind=ct"], root=root)
    path = write_active(recipe, root)
    assert load_active(root) == recipe
    tree = yaml.safe_load(path.read_text())
    assert tree["teacher"] is None
    assert set(flatten(tree)) == set(flatten(recipe.model_dump(mode="json")))
    before = path.stat().st_mtime_ns
    write_active(recipe, root)
    assert path.stat().st_mtime_ns == before


def test_the_active_recipe_is_called_as_it_was_written_and_by_what_was_edited_since(root):
    path = write_active(load_recipe("tiny", ["seed=4"], root=root), root, "tiny seed=4 (a \n try)")
    assert active_name(root) == "tiny seed=4 (a try)"
    text = path.read_text()
    path.write_text(text.replace("seed: 4", "seed: 5"))
    assert active_name(root) == "tiny seed=5", "as of dvc exp run -S"
    path.write_text(text.replace("seed: 4", "seed: 5").replace("# tiny", "# gone"))
    assert active_name(root) == EDITED
    path.write_text(text.partition("\n")[2])
    assert active_name(root) == EDITED


def test_local_paths_become_absolute_because_runs_work_in_a_clone(root, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    source = "data.source={kind: images, path: %s}"
    found = {
        path: load_recipe("tiny", [source % path], root=root, base=root).data.source.path
        for path in ("pictures.zip", "~/pictures", "/data/x", "s3://bucket/x/")
    }
    assert found == {
        "pictures.zip": str(root / "pictures.zip"),
        "~/pictures": "/home/someone/pictures",
        "/data/x": "/data/x",
        "s3://bucket/x/": "s3://bucket/x/",
    }
    assert load_recipe("tiny", root=root, base=root) == load_recipe("tiny", root=root)
    point = {"data.source": {"kind": "images", "path": "pictures.zip"}}
    assert vary("tiny", [point], root=root, source="sweep").data.source.path == str(root / "pictures.zip")


def test_values_that_are_no_paths_are_refused_as_ever(root):
    for value in ("{kind: images, path: 3}", "[1]", "3"):
        with pytest.raises(UserError, match=r"--set data\.source"):
            load_recipe("tiny", [f"data.source={value}"], root=root, base=root)


def test_scientific_notation_is_a_number(root):
    assert load_recipe("tiny", ["noise.sigma_min=2e-3"], root=root).noise.sigma_min == 0.002
