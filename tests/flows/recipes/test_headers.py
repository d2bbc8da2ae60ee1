"""The header of a recipe of a paper: its table *paper | here* says what the recipe does, so that it cannot grow old."""

import math
import re
from pathlib import Path

import pytest
import torch

from cm_core.distances import Lpips, Pixelwise
from cm_core.networks import DhariwalUNetParams, EDM2Params, SongUNetParams
from cm_core.training.ema import ConstantEma, HalfLifeEma, PowerEma
from flows.recipes.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[3]
OURS = re.compile("digits|folder|cifar10-quick|cifar10-speedrun")
PAPERS = [name for name in recipe_names(ROOT) if not OURS.match(name)]
CLASSES = {"cifar10": 10, "images": 1000}  # of conditional recipes
SONG = {"channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
FOUR_LEVELS = {"channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "channels_per_head": 64}
LSUN = {"channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_blocks": 2, "channels_per_head": 64}
ADM = {"attn_resolutions": (32, 16, 8), "double_norm": False}
NETWORKS = {  # EDM, App. F.1; Dhariwal and Nichol; EDM2, config G
    "DDPM++": SongUNetParams(**SONG, fourier_scale=None, encoder="standard", resample_filter="box"),
    "NCSN++": SongUNetParams(**SONG, fourier_scale=16, encoder="residual", resample_filter="fir"),
    "ADM, 296 M": DhariwalUNetParams(**FOUR_LEVELS, **ADM, scale_shift=True),
    "ADM, 526 M": DhariwalUNetParams(**LSUN, **ADM, scale_shift=False),
    "EDM2-S": EDM2Params(**FOUR_LEVELS, attn_resolutions=(16, 8), embedding="fourier", double_norm=False),
}
RATES = {ConstantEma: "decay", HalfLifeEma: "half_life_images", PowerEma: "width"}


def table_of(name):
    """Return the table's rows: {row: what is done here}, with the paper's words where it says "the same"."""
    lines = (ROOT / "params" / "recipes" / f"{name}.yaml").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("# |")]
    assert table[0] == ["student", "paper", "here"]
    same = re.compile("the same( file)?(?=,|$)")
    return {row: paper + here[found.end() :] if (found := same.match(here)) else here for row, paper, here in table[1:]}


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w-])\d[\d,]*(?:\.\d+)?(?:e-\d+)?", text)]


@pytest.fixture(params=PAPERS)
def header(request):
    """A recipe and its table."""
    return load_recipe(request.param, root=ROOT), table_of(request.param)


def trained(recipe):
    """The sections that are trained, and how their rows begin."""
    sections = recipe.students().items()
    return {"base " if name == "base" else "": one for name, one in sections if not one.is_imported}


def test_training(header):
    recipe, here = header
    if recipe.student.is_imported:
        assert here["weights"] == recipe.student.weights.rpartition("/")[2]
    for start, section in trained(recipe).items():
        train, rate = section.train, here[f"{start}learning rate"]
        assert numbers(here[f"{start}batch"])[0] == train.batch_size
        assert numbers(here[f"{start}steps"]) == [train.num_steps]
        kind, number = rate.replace(",", "").split()[:2]
        assert kind.lower().replace("adamw", "adam") == train.optimizer.kind
        assert float(number) == train.optimizer.learning_rate
        assert ("inverse root" in rate) == (train.schedule == "inverse_sqrt")
        assert ("linear" in rate) == (train.schedule == "linear")
        dropout, drops = section.network(recipe.network).dropout, here[f"{start}dropout"]
        assert float(drops.split()[0]) == dropout
        assert (" at 16 pixels and below" in drops) == (section.dropout_resolution == 16)
        assert here.get("flips") != "none" or not train.flip
    training = "" if recipe.student.is_imported else f"training {recipe.student.train.precision}, "
    assert here["precision"] == f"{training}samples {recipe.sample.precision}"


def test_averages(header):
    recipe, here = header
    for start, section in trained(recipe).items():
        claim, emas = here[f"{start}EMA"].replace("none", "0"), section.train.emas
        assert numbers(claim) == [getattr(ema, RATES[type(ema)]) for ema in emas]
        assert {kind for kind in ("half-life", "power") if kind in claim} == {
            ema.kind.replace("_", "-") for ema in emas if ema.kind != "constant"
        }


def test_network(header):
    """Channels, blocks and attention are those of the network that the table names; and its parameters are counted."""
    recipe, here = header
    claim, embedding, changes = here["network"], here.get("embedding", ""), {}
    (name,) = (name for name in NETWORKS if claim.startswith(name))
    if scale := re.search(r"Fourier scale ([\d.]+)", claim):
        changes["fourier_scale"] = float(scale[1])
    changes |= {"resample_filter": "fir"} if ", FIR" in claim else {}
    changes |= {"double_norm": True} if "double normalisation" in claim else {}
    changes |= {"embedding": "positional"} if "positional" in embedding else {}
    expected, dropout = NETWORKS[name].model_copy(update=changes), {"dropout", "dropout_resolution"}
    assert recipe.network.model_dump(exclude=dropout) == expected.model_dump(exclude=dropout)
    assert (recipe.noise.c_noise == "angle") == ("TrigFlow" in claim or "angle" in embedding)
    if millions := re.search(r"(\d+) M\b", claim):
        classes = CLASSES[recipe.data.source.kind] if recipe.conditional else 0
        with torch.device("meta"):
            network = recipe.network.build(recipe.data.input_shape(), classes)
        assert int(millions[1]) == round(sum(p.numel() for p in network.parameters()) / 1e6)


def test_teacher(header):
    recipe, here = header
    teacher, claim = recipe.teacher, here.get("teacher")
    assert (teacher is None) == (claim is None)
    if teacher is None:
        return
    assert ("imported" in claim) == teacher.is_imported
    network = {"VP": "DDPM++", "NCSN++": "NCSN++", "ADM": "ADM", "EDM2-S": "EDM2-S"}
    assert all(here["network"].startswith(network[word]) for word in network if word in claim)
    if teacher.is_imported:
        assert ("VP" in claim) == teacher.weights.endswith("-vp.pkl")
        assert ("conditional" in claim) == ("-cond-" in teacher.weights) == recipe.conditional
        return
    train = teacher.train
    assert f"{train.num_steps:,} x {train.batch_size:,}" in claim
    assert re.findall(r"bf16|fp16|fp32", claim)[-1] == train.precision  # the paper's may precede it
    assert ("augmented" in claim) == (teacher.method.augment is not None)
    assert ("learned weight" in claim) == teacher.method.adaptive_weight


def test_distances(header):
    recipe, here = header
    for start, section in trained(recipe).items():
        distance = getattr(section.method, "distance", None)
        claim = here.get(f"{start}objective", "") if section.method.kind == "cm_inf" else here.get(f"{start}distance")
        assert (claim is None) == (distance is None)
        if isinstance(distance, Lpips):
            words = "LPIPS(, max pooling)?" if distance.pooling == "max" else "LPIPS, average pooling"
            assert re.fullmatch(words, claim)
        elif isinstance(distance, Pixelwise):
            assert claim.startswith(f"{distance.kind}, ")
        elif distance is not None:
            c, root = distance.c_per_sqrt_dim, math.sqrt(math.prod(recipe.data.input_shape()))
            small = claim.endswith(f"with c = {c:g} sqrt(D)".replace("e-0", "e-"))
            assert small or claim == f"pseudo-Huber, c {c * root:.1g}"


def test_evaluation(header):
    """Without a row, one set of 50,000 images of every model."""
    recipe, here = header
    claim, sets = here.get("evaluation", "50,000 images"), recipe.evaluate.repeats
    count, *teachers = (int(number) for number in numbers(claim))
    assert claim.startswith("three sets of ") == (sets == 3) and sets in (1, 3)
    assert (count * sets, teachers) == (
        recipe.sample.num_images,
        [] if recipe.sample.teacher_images is None else [recipe.sample.teacher_images // sets],
    )
