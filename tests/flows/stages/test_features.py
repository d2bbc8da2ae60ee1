"""Feature networks: the classifier learns and repeats itself, weights are checked, DINOv2 agrees with torchvision."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm_core.metrics.classifier import (
    ARCHITECTURES,
    Classifier,
    ClassifierFeatures,
    accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
)
from cm_core.metrics.dinov2 import PRETRAINED_GRID, DinoV2, Size
from cm_core.metrics.features import build_extractor, extract_features, register_extractors, resize_like_pillow
from cm_core.tensors import from_pixels
from flows.data.feature_files import load_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages import features as stage
from flows.stages.features import DinoFeatures, ImageNetFeatures, features
from flows.stages.prepare import Data, prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15.9375).round().astype(np.uint8)[..., None], found.target.astype(np.int64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    prepare(Data(max_images=6), folder, Monitor())
    return folder


def train(images, labels, *, seed=0, **params):
    return train_classifier(images, labels, num_classes=10, params=ClassifierFeatures(**params), seed=seed, device=CPU)


def weights_of(net):
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_default_classifier_reads_held_out_digits(digits, architecture):
    images, labels = digits
    held_out = np.arange(len(images)) % 4 == 0
    net = train(images[~held_out], labels[~held_out], architecture=architecture)
    assert accuracy(net, images[held_out], labels[held_out], batch_size=128) >= 0.97


def test_the_seed_alone_decides_the_classifier(digits):
    torch.manual_seed(1)
    first = weights_of(train(*digits, num_steps=10, flip=True))
    torch.manual_seed(2)
    assert torch.equal(first, weights_of(train(*digits, num_steps=10, flip=True)))
    assert not torch.equal(first, weights_of(train(*digits, num_steps=10, flip=True, seed=1)))


def test_images_without_label_teach_nothing(digits):
    images, labels = digits[0].copy(), digits[1].copy()
    labels[::2] = -1
    first = weights_of(train(images, labels, num_steps=10))
    images[::2] = 255
    assert torch.equal(first, weights_of(train(images, labels, num_steps=10)))


@pytest.mark.parametrize("label", [-1, 3])
def test_fewer_than_two_classes_cannot_be_learnt(digits, label):
    with pytest.raises(ValueError, match="at least two classes"):
        train(digits[0], np.full_like(digits[1], label))


def test_accuracy_counts_labelled_images_only(digits):
    images, labels = digits[0][:50], digits[1][:50].copy()
    net = Classifier((1, 8, 8), num_classes=10, width=8)
    predicted = net(from_pixels(torch.from_numpy(images))).argmax(1).numpy()
    labels[:] = predicted
    labels[:10] = -1
    labels[10:20] = (predicted[10:20] + 1) % 10
    assert accuracy(net, images, labels, batch_size=7) == 0.75


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 13)])
def test_a_saved_classifier_comes_back_for_any_image_size(shape, architecture, tmp_path):
    net = Classifier(shape, num_classes=5, width=8, architecture=architecture).eval()
    save_classifier(net, tmp_path / "a.safetensors")
    save_classifier(net, tmp_path / "b.safetensors")
    loaded = load_classifier(tmp_path / "a.safetensors")
    x = torch.randn(2, *shape)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_extractor_reports_penultimate_layer_and_logits(digits, tmp_path):
    net = Classifier((1, 8, 8), num_classes=10, width=8).eval()
    save_classifier(net, tmp_path / "weights.safetensors")
    register_extractors()
    register_extractors()  # torch-fidelity refuses a name twice; a second call must do nothing
    extractor = build_extractor("classifier", tmp_path / "weights.safetensors", CPU)
    found = extract_features(digits[0][:10], extractor, batch_size=4, device=CPU)
    x0 = from_pixels(torch.from_numpy(digits[0][:10]))
    torch.testing.assert_close(found.features, net.features(x0))
    torch.testing.assert_close(found.logits, net(x0))


def test_each_architecture_names_its_metrics(prepared, tmp_path):
    for architecture, name in (("convnet", "classifier"), ("convmixer", "convmixer")):
        params = ClassifierFeatures(architecture=architecture, num_steps=10, batch_size=4)
        features(0, params, prepared, tmp_path / name, Monitor())
        files = load_feature_files(tmp_path / name)
        assert (files.short_name, files.reference.features.shape[1]) == (name, 4 * params.width)


def test_images_of_another_type_are_refused(tmp_path):
    save_classifier(Classifier((1, 8, 8), num_classes=2, width=8), tmp_path / "weights.safetensors")
    extractor = build_extractor("classifier", tmp_path / "weights.safetensors", CPU)
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, C\]"):
        extract_features(np.zeros((2, 8, 8, 1)), extractor, batch_size=2, device=CPU)


def test_an_unknown_extractor_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'resnet' is unknown; allowed: classifier, inception-v3-compat"):
        build_extractor("resnet", tmp_path, CPU)


class Payload:
    """Writes a file when unpickled without restriction."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"fc.weight": Payload(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ValueError, match="not a state dict of plain tensors"):
        build_extractor("inception-v3-compat", tmp_path / "weights.pth", CPU)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not the weights of inception-v3-compat"):
        build_extractor("inception-v3-compat", tmp_path / "weights.pth", CPU)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A state dict of Inception's shape with random numbers."""
    register_extractors()
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        net = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_from_a_local_file_looks_at_the_training_images(prepared, inception_weights, tmp_path):
    params = ImageNetFeatures(weights=str(inception_weights), sha256=sha256(inception_weights))
    features(0, params, prepared, tmp_path, Monitor())
    files = load_feature_files(tmp_path)
    assert (files.extractor, files.short_name) == ("inception-v3-compat", "inception")
    assert files.sha256 == sha256(inception_weights) == sha256(files.weights)
    assert files.reference.features.shape == (6, 2048)

    grey = np.load(prepared / "train_images.npy")[:2]
    extractor = build_extractor("inception-v3-compat", files.weights, CPU)
    colour = extract_features(grey.repeat(3, axis=-1), extractor, batch_size=2, device=CPU)
    np.testing.assert_allclose(files.reference.features[:2], colour.features, rtol=1e-4, atol=1e-6)
    assert colour.logits.shape == (2, 1008)


def test_a_wrong_checksum_is_refused(prepared, inception_weights, tmp_path):
    params = ImageNetFeatures(weights=str(inception_weights), sha256="0" * 64)
    with pytest.raises(UserError, match=f"sha256 is {sha256(inception_weights)}, expected 0000"):
        features(0, params, prepared, tmp_path, Monitor())


def test_missing_weights_name_the_file_the_folder_and_the_alternative(prepared, tmp_path, monkeypatch):
    def unreachable(uri, into, **_):
        raise UserError(f"{uri}: cannot be reached")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(stage, "fetch", unreachable)
    with pytest.raises(UserError) as error:
        features(0, ImageNetFeatures(), prepared, tmp_path / "out", Monitor())
    (line,) = str(error.value).splitlines()
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        str(tmp_path / "hub" / "checkpoints"),
        "https://github.com/toshas/torch-fidelity",
        "features.weights",
        "features: classifier",
    ):
        assert part in line


def test_a_damaged_file_in_the_cache_of_torch_is_refused(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / stage.PUBLISHED["inception-v3-compat"].name).write_bytes(b"half a download")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="does not begin with 6726825d"):
        features(0, ImageNetFeatures(), prepared, tmp_path / "out", Monitor())


def test_published_addresses_are_those_of_torch_fidelity():
    register_extractors()
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert stage.PUBLISHED["inception-v3-compat"].url == URL_INCEPTION_V3
    assert stage.PUBLISHED["vgg16"].url == torchvision.models.VGG16_Weights.IMAGENET1K_V1.url


def test_torchvision_comes_without_the_compiler_which_is_there_when_asked():
    program = """
import sys
import torch
from cm_core.metrics.torchvision_shim import ensure_torchvision
ensure_torchvision()
import torch_fidelity
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu")
import torch._dynamo
assert torch._dynamo.utils.is_compile_supported("cpu")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_classifier_needs_labels(prepared, tmp_path):
    unlabelled = tmp_path / "prepare"
    unlabelled.mkdir()
    for path in prepared.iterdir():
        (unlabelled / path.name).write_bytes(path.read_bytes())
    np.save(unlabelled / "train_labels.npy", np.full(6, -1))
    with pytest.raises(UserError, match="at least two classes.*allowed: inception-v3-compat"):
        features(0, ClassifierFeatures(), unlabelled, tmp_path / "out", Monitor())


def test_the_artifact_is_the_same_bytes_each_time(prepared, tmp_path):
    params = ClassifierFeatures(num_steps=10, batch_size=4)
    for name in ("a", "b"):
        features(0, params, prepared, tmp_path / name, Monitor())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    facts = json.loads((tmp_path / "a" / "features.json").read_text())
    assert facts["feature_dim"] == 4 * params.width
    assert facts["sha256"] == sha256(tmp_path / "a" / "weights.safetensors")
    assert 0 <= facts["accuracy"] <= 1


@pytest.fixture(scope="module")
def dino_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "random.pth"
    torch.save(DinoV2(Size(384, 12, 6)).state_dict(), path)
    return str(path)


def test_published_statistics_take_the_place_of_the_training_images(prepared, dino_weights, tmp_path):
    mu, sigma, path = np.arange(384.0), np.eye(384) + 0.1, tmp_path / "published.npz"
    np.savez(path, mu=mu, sigma=sigma, mu_s=np.zeros(3))
    params = DinoFeatures(size="s", weights=dino_weights, reference=str(path), reference_sha256=sha256(path))
    features(0, params, prepared, tmp_path / "out", Monitor())
    files = load_feature_files(tmp_path / "out")
    np.testing.assert_array_equal(files.reference.statistics.mu, mu)
    np.testing.assert_array_equal(files.reference.statistics.sigma, sigma)
    assert files.reference.features is None
    assert files.described == {"images": "published statistics, published.npz", "sha256": sha256(path)}
    with pytest.raises(UserError, match="expected 0000"):
        features(0, params.model_copy(update={"reference_sha256": "0" * 64}), prepared, tmp_path / "b", Monitor())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of 3 features, dinov2_vits14 has 384"),
        ({"mu": np.zeros(384), "sigma": np.eye(3)}, r"mu is \[384\] and sigma \[3, 3\]"),
        ({"mu": np.full(384, np.nan), "sigma": np.eye(384)}, "values that are not finite"),
        ({"mu": np.zeros(384)}, "no .npz file of the arrays mu and sigma"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "no .npz file of the arrays mu and sigma"),
        (None, "no .npz file of the arrays mu and sigma"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_in_one_line(prepared, dino_weights, tmp_path, arrays, words):
    path = tmp_path / "published.npz"
    path.write_bytes(b"half a download") if arrays is None else np.savez(path, **arrays)
    params = DinoFeatures(size="s", weights=dino_weights, reference=str(path))
    with pytest.raises(UserError, match=words) as refused:
        features(0, params, prepared, tmp_path / "out", Monitor())
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_statistics_that_unpack_to_much_are_refused_before_they_do(prepared, dino_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.data.archives.MAX_FREE", 1000)
    monkeypatch.setattr("flows.data.archives.MAX_RATIO", 0.5)
    path = tmp_path / "published.npz"
    np.savez(path, mu=np.zeros(384), sigma=np.eye(384))
    params = DinoFeatures(size="s", weights=dino_weights, reference=str(path))
    with pytest.raises(UserError, match="a decompression bomb"):
        features(0, params, prepared, tmp_path / "out", Monitor())


def test_dinov2_agrees_with_the_vision_transformer_of_torchvision():
    register_extractors()
    from torchvision.models import VisionTransformer

    dim, depth, heads = 32, 2, 4
    torch.manual_seed(0)
    net = DinoV2(Size(dim, depth, heads))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in net.blocks:
        block.ls1.gamma.data.fill_(1)  # torchvision has no LayerScale
        block.ls2.gamma.data.fill_(1)
    other = VisionTransformer(56, 14, depth, heads, dim, 4 * dim)
    other.heads = torch.nn.Identity()
    other.class_token.data = net.cls_token.data
    other.encoder.pos_embedding.data = net.position_at(4, 4).data
    other.conv_proj.load_state_dict(net.patch_embed["proj"].state_dict())
    other.encoder.ln.load_state_dict(net.norm.state_dict())
    for theirs, ours in zip(other.encoder.layers, net.blocks, strict=True):
        theirs.ln_1.load_state_dict(ours.norm1.state_dict())
        theirs.ln_2.load_state_dict(ours.norm2.state_dict())
        theirs.self_attention.in_proj_weight.data = ours.attn.qkv.weight.data
        theirs.self_attention.in_proj_bias.data = ours.attn.qkv.bias.data
        theirs.self_attention.out_proj.load_state_dict(ours.attn.proj.state_dict())
        theirs.mlp[0].load_state_dict(ours.mlp.fc1.state_dict())
        theirs.mlp[3].load_state_dict(ours.mlp.fc2.state_dict())
    x = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 32, 64, 256, 300])
def test_dinov2_sees_the_images_that_pillow_makes(side):
    """Of noise, the hardest case: many edges of full contrast."""
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    expected = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    seen = resize_like_pillow(torch.from_numpy(images).permute(0, 3, 1, 2), 224).permute(0, 2, 3, 1).numpy()
    error = np.abs(seen - np.stack(expected))
    assert error.max() <= 2 and (error > 0).mean() < 0.02


def test_dinov2_normalises_with_the_moments_of_imagenet(dino_weights):
    extractor = build_extractor("dinov2_vits14", Path(dino_weights), CPU)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = extractor.read.net((x - mean) / std)
    found = extract_features(images, extractor, batch_size=2, device=CPU).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dinov2_samples_its_position_embedding_where_the_published_code_does():
    """A ramp comes back as the coordinates that are sampled: (i + 1/2) * 37 / 16.1 - 1/2 away from the border."""
    net = DinoV2(Size(2, 1, 1))
    ramp = torch.arange(PRETRAINED_GRID, dtype=torch.float32)
    net.pos_embed.data[0, 1:, 0] = ramp.repeat_interleave(PRETRAINED_GRID)
    net.pos_embed.data[0, 1:, 1] = ramp.repeat(PRETRAINED_GRID)
    sampled = net.position_at(16, 16)[0, 1:].unflatten(0, (16, 16)).detach()
    expected = (torch.arange(1, 14) + 0.5) * 37 / 16.1 - 0.5
    # The kernel follows a ramp to within 0.05; sampling at 37 / 16 would be 0.19 off at the far end.
    torch.testing.assert_close(sampled[1:14, 0, 0], expected, rtol=0, atol=0.06)
    torch.testing.assert_close(sampled[0, 1:14, 1], expected, rtol=0, atol=0.06)
    torch.testing.assert_close(net.position_at(37, 37), net.pos_embed)


def test_dinov2_from_a_local_file_through_the_stage(prepared, dino_weights, tmp_path):
    features(0, DinoFeatures(size="s", weights=dino_weights), prepared, tmp_path / "out", Monitor())
    files = load_feature_files(tmp_path / "out")
    assert (files.extractor, files.short_name) == ("dinov2_vits14", "dinov2")
    assert files.reference.features.shape == (6, 384)
