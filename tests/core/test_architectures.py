from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import architectures, weights
from core.architectures import recognise
from core.architectures.resnet import ResNet
from core.architectures.wide_resnet import WideResNet
from core.classifier import Classifier, Preprocessing
from core.errors import ArchitectureMismatch, ArchitectureUnknown, BadJob, BadWeights
from core.images import ImageSet, as_floats

UNIT = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def shapes(network: torch.nn.Module, prefix: str = "", renames: tuple[tuple[str, str], ...] = ()) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, value in network.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        found[prefix + name] = tuple(value.shape)
    return found


@pytest.mark.parametrize(
    ("depth", "width", "parameters", "entries"),
    [(16, 1, 175_066, 82), (16, 2, 691_674, 83), (10, 1, 77_850, 46), (10, 2, 303_706, 47), (40, 1, 563_930, 226), (40, 2, 2_243_546, 227)],
)
def test_wide_resnets_have_the_published_size_and_are_recognised(depth: int, width: int, parameters: int, entries: int) -> None:
    network = WideResNet(depth=depth, width=width, classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    for prefix in ("", "module.", "module._orig_mod.", "model.net."):
        (found,) = recognise(shapes(network, prefix))
        assert (found.name, found.classes, found.channels, found.prefix) == (f"wrn-{depth}-{width}", 10, 3, prefix)


@pytest.mark.parametrize(("stem", "parameters"), [("cifar", 11_173_962), ("cifar-maxpool", 11_173_962), ("imagenet", 11_181_642)])
def test_resnet18_stems(stem: str, parameters: int) -> None:
    network = ResNet(depth=18, classes=10, channels=3, stem=stem)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    names = [found.name for found in recognise(shapes(network))]
    assert names == (["resnet18"] if stem == "imagenet" else ["resnet18-cifar", "resnet18-cifar-maxpool"])


def test_kuangliu_names_are_resnets_without_doubt() -> None:
    renames = ((".downsample.", ".shortcut."), ("fc.", "linear."))
    (found,) = recognise(shapes(ResNet(depth=18, classes=43, channels=3, stem="cifar"), "module.", renames))
    assert (found.name, found.classes) == ("resnet18-cifar", 43)


def test_resnet50_equals_torchvisions() -> None:
    from torchvision.models import resnet50

    theirs = resnet50(num_classes=7).eval()
    (found,) = recognise({name: tuple(value.shape) for name, value in theirs.state_dict().items()})
    assert found.name == "resnet50"
    ours = weights.build(dict(theirs.state_dict()), found, UNIT)
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_go_back_out_under_the_names_they_came_with(tmp_path: object, prefix: str, renamed: bool) -> None:
    network = ResNet(depth=18, classes=10, channels=3, stem="cifar")
    state = {name.replace(".downsample.", ".shortcut.").replace("fc.", "linear.") if renamed else name: value for name, value in network.state_dict().items()}
    given = {prefix + name: value for name, value in state.items()}
    architecture = recognise({name: tuple(value.shape) for name, value in given.items()})[0]
    path = tmp_path / "out.safetensors"  # type: ignore[operator]
    weights.save(weights.build(given, architecture, UNIT), path)
    back = load_file(path)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_features_and_stages_fit_together() -> None:
    network = WideResNet(depth=10, width=1, classes=4).eval()
    architecture = recognise(shapes(network))[0]
    model = Classifier(network, architecture, UNIT)
    images = torch.rand(2, 3, 32, 32)
    assert [tuple(stage.shape[1:]) for stage in model.stages(images)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert torch.allclose(model.head(model.features(images)), model(images))


def test_a_wide_block_reads_the_activated_input_only_where_channels_change() -> None:
    network = WideResNet(depth=10, width=1, classes=2).eval()
    x = torch.randn(1, 16, 4, 4)
    block = network.block1.layer[0]
    expected = x + block.conv2(torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(x))))))
    assert torch.allclose(block(x.clone()), expected, atol=1e-6)
    wider = network.block2.layer[0]
    activated = torch.relu(wider.bn1(x))
    expected = wider.convShortcut(activated) + wider.conv2(torch.relu(wider.bn2(wider.conv1(activated))))
    assert torch.allclose(wider(x.clone()), expected, atol=1e-6)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ArchitectureUnknown, match=r"no architecture.*layers\.0\.weight"):
        recognise({"layers.0.weight": (3, 3)})


def test_contradictions_are_named() -> None:
    state = WideResNet(depth=10, width=1, classes=10).state_dict()
    architecture = recognise({name: tuple(value.shape) for name, value in state.items()})[0]
    bent = {**state, "block2.layer.0.conv2.weight": torch.zeros(5, 5, 3, 3)}
    del bent["bn1.bias"]
    bent["surplus"] = torch.zeros(1)
    with pytest.raises(ArchitectureMismatch, match=r"bn1\.bias is missing; surplus is left over; block2\.layer\.0\.conv2\.weight has shape"):
        weights.build(bent, architecture, UNIT)


def test_nan_weights_are_refused(tmp_path: object) -> None:
    path = tmp_path / "nan.safetensors"  # type: ignore[operator]
    save_file({"a": torch.tensor([float("nan")])}, path)
    with pytest.raises(BadWeights, match="the first is a"):
        weights.read(path)


def trained_on(preprocessing: Preprocessing, stem: str) -> dict[str, torch.Tensor]:
    """A ResNet whose BatchNorm statistics have seen images through `preprocessing` and `stem`."""
    torch.manual_seed(1)
    network = ResNet(depth=18, classes=10, channels=3, stem=stem)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average over batches
    images = as_floats(pictures().images)
    mean, std = torch.tensor(preprocessing.mean)[:, None, None], torch.tensor(preprocessing.std)[:, None, None]
    with torch.no_grad():
        for batch in ((images - mean) / std).split(32):
            network.train()(batch)
    return network.state_dict()


def pictures() -> ImageSet:
    """Smooth colour images, like photographs in their statistics."""
    noise = torch.rand(48, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(noise, size=(16, 16), mode="bilinear")
    return ImageSet((smooth * 255).to(torch.uint8))


@pytest.mark.parametrize("stem", ["cifar", "cifar-maxpool"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_preprocessing_and_maxpool_are_found_from_batchnorm(stem: str, index: int) -> None:
    wanted = weights.PREPROCESSINGS[index]
    model, found = weights.identify(trained_on(wanted, stem), pictures())
    assert (found.preprocessing.name, found.architecture.name) == (wanted.name, f"resnet18-{stem}")
    assert model.architecture == found.architecture


def test_what_cannot_be_found_out_is_asked_for() -> None:
    state = ResNet(depth=18, classes=10, channels=3, stem="cifar").state_dict()
    with pytest.raises(BadJob, match="preprocessing"):
        weights.identify(dict(state), None)


# -- every name of the catalogue ---------------------------------------------------------------------------------------


def public(name: str, classes: int = 10) -> tuple[architectures.Architecture, dict[str, tuple[int, ...]]]:
    """An architecture and the tensors of its checkpoint under the names its own code gives them; nothing is allocated."""
    described = architectures.named(name, classes=classes)
    with torch.device("meta"):
        network = described.build()
    return described, {described.theirs(key): tuple(value.shape) for key, value in network.state_dict().items()}


# Parameters and state entries with ten classes, measured on the official models.
PUBLISHED = {
    "resnet18-cifar": (11_173_962, 122), "resnet50-cifar": (23_520_842, 320), "resnet18": (11_181_642, 122), "resnet34": (21_289_802, 218),
    "resnet50": (23_528_522, 320), "preactresnet18": (11_171_146, 102), "vgg19-bn-cifar": (20_040_522, 114), "vgg19-bn-cifar-mlp": (38_958_922, 118),
    "vgg19": (139_611_210, 38), "vgg19-bn": (139_622_218, 118), "densenet161-cifar": (26_482_378, 962), "densenet161-cifar-maxpool": (26_482_570, 967),
    "densenet161": (26_494_090, 967), "wrn-16-1-trap-plain": (175_626, 97), "wrn-16-1-trap-4": (193_687, 108), "wrn-16-1-trap-5": (210_743, 108),
    "wrn-16-1-replaced-4": (308_244, 134), "wrn-16-1-replaced-5": (250_516, 118), "wrn-16-1-replaced-6": (176_404, 104),
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "entries"), [(name, *sizes) for name, sizes in PUBLISHED.items()])
def test_published_sizes(name: str, parameters: int, entries: int) -> None:
    described, shapes_ = public(name)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in described.build().parameters()) == parameters
    assert len(shapes_) == entries


# timm's are a thousand, and recognised by a digest as torchvision's are.
@pytest.mark.parametrize("name", [name for name in architectures.names() if not name.startswith("timm-")])
def test_every_architecture_is_recognised_from_its_checkpoint(name: str) -> None:
    described, given = public(name, classes=7)
    for prefix in ("", "module."):
        found = recognise({prefix + key: shape for key, shape in given.items()})
        # A trap that ends after block 5 or 6 has the same tensors and the same classifier.
        assert name.replace("trap-6", "trap-5") in [one.name for one in found]
        (same,) = [one for one in found if one.name == name] or [found[0]]
        assert (same.classes, same.channels, same.input_size) == (7, 3, described.input_size)
        assert {same.ours(prefix + key) for key in given} == {described.ours(key) for key in given}
    assert all(len(one.options) == len(described.options) for one in found)


SMALL_ONES = (
    "preactresnet18",
    "densenet121-cifar",
    "vgg11-bn-cifar-mlp",
    "mobilenet-v3-small-cifar",
    "vit-cifar",
    "wrn-16-1-replaced-5",
    "resnet18-supcontrast",
)


@pytest.mark.parametrize("name", SMALL_ONES)
def test_features_head_and_stages_agree_with_forward(name: str) -> None:
    described = architectures.named(name, classes=5)
    network = described.build().eval()
    images = torch.rand(2, 3, described.input_size, described.input_size)
    with torch.no_grad():
        features, maps = network.features(images), network.stages(images)
        assert torch.equal(network(images), network.head(features))
    assert features.shape == (2, network.head.in_features) and network(images).shape == (2, 5)
    assert all(one.dim() == 4 and len(one) == 2 for one in maps) and len(maps) >= 3
    network.train()(images).sum().backward()
    trained = [parameter.grad is not None for parameter in network.head.parameters()]
    assert all(trained)


@pytest.mark.parametrize(
    ("name", "builder", "size"),
    [
        ("vgg11-bn", "vgg11_bn", 64), ("densenet121", "densenet121", 64), ("mobilenet-v2", "mobilenet_v2", 64), ("mobilenet-v3-large", "mobilenet_v3_large", 64),
        ("efficientnet-b0", "efficientnet_b0", 64), ("convnext-tiny", "convnext_tiny", 64), ("resnet34", "resnet34", 64), ("vit-b-16", "vit_b_16", 224),
    ],
)  # fmt: skip
def test_the_outputs_are_torchvisions(name: str, builder: str, size: int) -> None:
    from torchvision import models

    theirs = getattr(models, builder)(num_classes=4).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    found = [one for one in recognise({key: tuple(value.shape) for key, value in theirs.state_dict().items()}) if one.name == name]
    ours = weights.build(dict(theirs.state_dict()), found[0], UNIT)
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5, rtol=1e-4)


def test_the_published_densenet_joins_new_maps_first() -> None:
    from core.architectures.densenet import Bottleneck

    block = Bottleneck(4, 2).eval()
    x = torch.rand(1, 4, 5, 5)
    assert torch.equal(block(x)[:, 2:], x)


def test_the_trap_networks_first_norm_of_a_growing_block_is_thrown_away() -> None:
    network = architectures.named("wrn-16-1-trap-plain", classes=3).build().eval()
    images = torch.rand(2, 3, 32, 32)
    before = network(images)
    torch.nn.init.constant_(network.get_submodule("block2.0.bn1").weight, 7.0)  # type: ignore[arg-type]
    assert torch.equal(network(images), before)
    torch.nn.init.constant_(network.get_submodule("block2.1.bn1").weight, 7.0)  # type: ignore[arg-type]
    assert not torch.equal(network(images), before)


def test_the_replaced_resnet_has_the_published_size() -> None:
    with torch.device("meta"):
        network = architectures.named("resnet34-replaced-31", classes=12).build()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_722_072 and len(network.state_dict()) == 262


def test_an_encoder_with_a_classifier_of_its_own_is_a_resnet() -> None:
    _, given = public("resnet18-cifar")
    theirs = {(key if key.startswith("fc.") else f"encoder.{key.replace('downsample', 'shortcut')}"): shape for key, shape in given.items()}
    (found,) = recognise(theirs)
    assert found.name == "resnet18-cifar"
    assert {found.ours(key) for key in theirs} == set(given)
    assert all(found.theirs(found.ours(key)) == key for key in theirs)


def test_the_index_of_torchvision_is_current() -> None:
    from core.architectures import torchvision_whole

    assert torchvision_whole.index() == torchvision_whole._index()


@pytest.mark.parametrize(
    ("name", "size"), [("resnext50-32x4d", 64), ("shufflenet-v2-x0-5", 64), ("mnasnet0-5", 64), ("efficientnet-b1", 64), ("alexnet", 224), ("swin-t", 64)]
)
def test_whole_torchvision_models_give_torchvisions_outputs(name: str, size: int) -> None:
    from torchvision import models

    theirs = models.get_model(name.replace("-", "_"), weights=None, num_classes=6).eval()
    (found,) = recognise({f"module.{key}": tuple(value.shape) for key, value in theirs.state_dict().items()})
    assert (found.name, found.classes) == (name, 6)
    ours = weights.build({f"module.{key}": value for key, value in theirs.state_dict().items()}, found, UNIT)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert torch.allclose(ours.head(ours.features(images)), theirs(images), atol=1e-5)
        assert len(ours.stages(images)) >= 2
    copy = ours.frozen_copy()
    with torch.no_grad():
        assert torch.equal(copy(images), ours(images))
    assert {found.theirs(key) for key in ours.network.state_dict()} == set(theirs.state_dict())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArchitectureUnknown, match="wrn-16-3") as caught:
        architectures.named("wrn-16-3", classes=2)
    assert "wrn-16-1" in caught.value.advice and len(caught.value.advice) < 500


@pytest.mark.parametrize(
    ("model", "size", "alone"),
    [("resnet26d", 64, True), ("mixnet_s", 64, False), ("deit_tiny_patch16_224", 224, False), ("regnety_002", 64, True), ("tf_efficientnet_lite0", 64, False)],
)
def test_timms_models_are_recognised_and_give_timms_outputs(model: str, size: int, alone: bool) -> None:
    import timm

    theirs = timm.create_model(model, num_classes=6).eval()
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    candidates = recognise({key: tuple(value.shape) for key, value in state.items()})
    assert (len(candidates) == 1) == alone and len(candidates) <= 40
    (found,) = [one for one in candidates if one.name == f"timm-{model}"]
    ours = weights.build(state, found, UNIT)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        assert torch.allclose(ours.head(ours.features(images)), theirs(images), atol=1e-5)
    assert {found.theirs(key) for key in ours.network.state_dict()} == set(theirs.state_dict())
    assert architectures.named(f"timm-{model}", classes=6).name == found.name
