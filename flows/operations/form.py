"""The form of a flow's parameters on Prefect's pages, made of the recipe's JSON schema.

Both pages name a field by its title and add "(Optional)" unless it is required; they tell the choices of a union by the
keys of its value alone, order fields by `position`, and leave out a list that became empty unless `minItems` is there.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect import Flow

ORDER = """
name recipe num_images seed conditional
student data teacher base sample features evaluate edit noise network
kind method source train
""".split()
LATE = ("weights", "reference")  # in place of a training, of the training images
HIDDEN = frozenset(  # what a recipe file settles: it stays as the recipe has it, and `cm` changes it
    """
    accumulate checkpoint_activations compile on_nonfinite max_nonfinite log_every save_every grid_every grid_sampler
    betas epsilon s_churn s_min s_max s_noise mu_per_interval drop_classes sha256 reference_sha256 md5 licence
    version background colours evaluate_images evaluate_mid_sigmas num_results factor stroke_sigma denoise_sigma
    isc_splits isc_min_images kid_subsets kid_subset_size prc_neighbourhood prc_images resize_below
    Edit.seed Edit.num_steps Evaluate.batch_size Sample.batch_size ImageNetFeatures.batch_size DinoFeatures.batch_size
    ClassifierFeatures.width ClassifierFeatures.num_steps ClassifierFeatures.batch_size ClassifierFeatures.max_shift
    ClassifierFeatures.learning_rate ClassifierFeatures.flip ClassifierFeatures.architecture
    snapshots widths Sample.emas weak_teacher guidance_interval weight_decay dropout_resolution fourier_scale
    resample_filter
    """.split()
)
WORDS = {"num": "number of", "emas": "EMAs", "kid": "KID", "md5": "MD5", "sha256": "SHA-256", "sigma": "σ"}
TITLES = {  # the field's terms, where a name and WORDS do not give them
    "accumulate": "Gradient accumulation, micro-batches",
    "adaptive_weight": "Adaptive weighting",
    "anneal": "Anneal the learning rate in each halving",
    "attn_resolutions": "Attention resolutions",
    "b": "Steepness b of the mapping",
    "base": "Base, trained before the student",
    "beside_fid": "Metrics beside FID",
    "boundary_share": "Share of t = t′",
    "boundary_weight": "Weight of these pairs",
    "betas": "β1, β2",
    "c_noise": "Noise conditioning c_noise",
    "c_per_sqrt_dim": "c / √D",
    "channel_mult": "Channel multipliers",
    "channels_per_head": "Channels per attention head",
    "checkpoint_activations": "Activation checkpointing",
    "clip_norm": "Gradient clipping, norm",
    "compile": "torch.compile",
    "conditional": "Class-conditional",
    "damaged": "Damaged images",
    "denoise_sigma": "σ of denoise",
    "distil": "Distil the teacher",
    "double_norm": "Adaptive double normalisation",
    "drop_classes": "Leave out the layer of class labels",
    "dropout_resolution": "Largest resolution with dropout",
    "emas": "EMAs of the weights",
    "Sample.emas": "Of which EMAs",
    "epsilon": "ε",
    "evaluate_every": "Steps between evaluations in training",
    "evaluate_images": "Images of such an evaluation",
    "evaluate_mid_sigmas": "Their intermediate noise levels σ",
    "factor": "Factor of superres",
    "flip": "Horizontal flips",
    "form": "Boundary condition",
    "freedom": "Degrees of freedom of ln t",
    "fourier_scale": "Scale of the Fourier embedding",
    "grid_every": "Steps between sample grids",
    "grid_sampler": "Sampler of the grids in training",
    "guidance": "Classifier-free guidance",
    "guidance_range": "Range of guidance weights",
    "Sample.guidance": "Further guidance weights",
    "half_life_images": "Half-life in images",
    "heldout_fraction": "Held-out fraction",
    "heldout_path": "Held-out path",
    "init_from": "Initial weights",
    "instant_share": "Share of r = t",
    "isc_min_images": "Inception score, fewest images",
    "isc_splits": "Inception score, splits",
    "k": "Height k of the mapping",
    "kid_subset_size": "KID, images of a subset",
    "kid_subsets": "KID, subsets",
    "loc": "Location of ln t",
    "log_every": "Steps between logged metrics",
    "mapping": "Mapping n(t)",
    "mid_sigmas": "Intermediate noise levels σ",
    "mu0": "Initial target decay μ0",
    "mu_per_interval": "μ by intervals",
    "num_blocks": "Residual blocks per resolution",
    "num_scales": "Discretization steps N",
    "on_nonfinite": "On a loss that is not finite",
    "p_mean": "Mean of ln σ, P_mean",
    "p_std": "Standard deviation of ln σ, P_std",
    "power": "Power p of the weight",
    "power_c": "Constant c of the weight",
    "prc_images": "Precision and recall, images",
    "prc_neighbourhood": "Precision and recall, neighbours k",
    "q": "Shrinking factor q",
    "r_mean": "Mean of logit r",
    "r_std": "Standard deviation of logit r",
    "ramp": "Ramp of the half-life",
    "ramp_steps": "Learning-rate warmup steps",
    "repeats": "Sets of images",
    "ratio": "Ratio r / t",
    "rho": "Curvature ρ of the grid",
    "s0": "Initial discretization steps s0",
    "s1": "Final discretization steps s1",
    "s_churn": "S_churn",
    "s_max": "S_max",
    "s_min": "S_min",
    "s_noise": "S_noise",
    "save_every": "Steps between saved states",
    "scale": "Scale of ln t",
    "scale_shift": "Scale and shift by the noise level",
    "schedule": "Learning-rate schedule",
    "schedule_start": "Steps before the decay",
    "sigma_data": "Standard deviation of the data σ_data",
    "sigma_max": "Largest noise level σ_max",
    "sigma_min": "Smallest noise level σ_min",
    "snapshots": "Snapshots for post-hoc EMA",
    "split": "Dividing noise level t′",
    "stroke_sigma": "σ of stroke",
    "t_mean": "Mean of logit t",
    "t_std": "Standard deviation of logit t",
    "MeanFlow.tangent": "Direction of the derivative",
    "tangent": "Tangent normalisation",
    "tangent_c": "c of the tangent",
    "target_decay": "Target EMA decay μ",
    "teacher_images": "Images of the teacher",
    "teacher_sampler": "Sampler of the teacher",
    "transforms": "Transformations",
    "urls": "Addresses",
    "warmup_steps": "Tangent warmup steps",
    "Student.weights": "Checkpoint in place of a training",
    "Teacher.weights": "Checkpoint in place of a training",
    "PowerEma.width": "Relative width of the EMA",
    "widths": "Widths of post-hoc EMAs",
}
TABS = {  # of a choice, by its kind, short enough for one row; others have the title of their class
    "cd": "CD · distillation",
    "ct": "CT · training",
    "ict": "iCT · improved",
    "ect": "ECT · easy",
    "scm": "sCM",
    "pd": "PD",
    "cm_inf": "CM∞",
    "meanflow": "MeanFlow",
    "dmd": "DMD",
    "cmt": "CMT",
    "tcm": "TCM",
    "l2 or l1": "ℓ2 or ℓ1",
    "pseudo_huber": "Pseudo-Huber",
    "lpips": "LPIPS",
    "classifier": "Classifier",
    "inception-v3-compat or vgg16": "Inception v3 or VGG16",
    "dinov2": "DINOv2",
    "constant": "Constant",
    "half_life": "Half-life",
    "power": "Power function",
}


def form_of(flow: "Flow") -> dict[str, Any]:
    """Return the schema of the parameters that a person chooses; a worker's own folder is the workspace."""
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    del schema["properties"]["root"]
    for name, section in {"": schema, **schema["definitions"]}.items():
        _arrange(name, section)
    return schema


def title_of(name: str, section: str = "") -> str:
    """Return the title of a field."""
    text = (
        TITLES.get(f"{section}.{name}")
        or TITLES.get(name)
        or " ".join(WORDS.get(word, word) for word in name.split("_"))
    )
    return text[0].upper() + text[1:]


def _arrange(section_name: str, section: dict[str, Any]) -> None:
    """Choose, name and order the fields of a section; what has a default is required, since the form fills it in."""
    shown = {
        name: field for name, field in section["properties"].items() if not HIDDEN & {name, f"{section_name}.{name}"}
    }
    if len(shown) < len(section["properties"]):
        section.pop("additionalProperties")
    if "title" in section:
        section["title"] = TABS.get(section["title"], section["title"])
    for position, name in enumerate(sorted(shown, key=lambda name: _place(name, shown))):
        shown[name] |= {"title": title_of(name, section_name), "position": position}
    section |= {"properties": shown, "required": list(shown)}
    for part in [part for field in shown.values() for part in _parts(field)]:
        if part.get("type") == "array":
            part.setdefault("minItems", 0)
        if {"type": "null"} in (options := part.get("anyOf", [])):
            part["anyOf"] = [one if "$ref" in one else one | {"title": _tab(one)} for one in options]
    if "const" in (kind := shown.get("kind", {})):
        kind |= {"enum": [kind.pop("const")]}
    kind.pop("description", None)  # the tab says it


def _tab(option: dict[str, Any]) -> str:
    return "none" if option["type"] == "null" else "value"


def _place(name: str, fields: dict[str, Any]) -> tuple[int, int]:
    rank = ORDER.index(name) if name in ORDER else len(ORDER) + (name in LATE)
    return rank, fields[name]["position"]


def _parts(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a field, its alternatives and its items."""
    yield field
    for part in (*field.get("anyOf", ()), *([field["items"]] if isinstance(field.get("items"), dict) else ())):
        yield from _parts(part)
