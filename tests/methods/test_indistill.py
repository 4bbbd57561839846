from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.methods import KD, InDistill
from attar.teacher import Teacher
from attar.testing import MethodContract
from attar.zoo import CifarCNN
from networks import IMAGES, LABELS, Net

WIDE = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def cnn(*channels: int, seed: int = 0) -> CifarCNN:
    """A plain CNN whose batch norms are not trivial."""
    torch.manual_seed(seed)
    network = CifarCNN(channels, num_classes=3).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.2, 2.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network


def built(student: nn.Module, *methods: attar.Method, images: Tensor = WIDE) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(student, methods, attar.Classification(3)).build(images).train()


def step(distiller: attar.Distiller, images: Tensor = WIDE) -> attar.Terms:
    distiller.zero_grad(set_to_none=True)
    terms = distiller((images, LABELS), 0.5)
    terms.total().backward()
    return terms


def maps(network: nn.Module, images: Tensor = WIDE) -> list[Tensor]:
    found = []
    x = images
    for i in (1, 2, 3):
        for layer in ("conv", "bn", "act", "pool"):
            x = network.get_submodule(f"{layer}{i}")(x)
        found.append(x)
    return found


def test_the_selected_channels_are_the_strongest_filters() -> None:
    teacher, student = cnn(8, 12, 16, seed=1), cnn(4, 6, 8)
    method = InDistill(teacher)
    distiller = built(student, method).eval()
    expected = []
    for i, (ours, theirs) in enumerate(zip(maps(student), maps(teacher), strict=True)):
        norms = teacher.get_submodule(f"conv{i + 1}").weight.abs().sum(dim=(1, 2, 3))
        kept = norms.argsort(descending=True)[: ours.shape[1]].sort().values
        torch.testing.assert_close(method.target(i, WIDE), theirs[:, kept], rtol=0, atol=0)
        expected.append((theirs[:, kept] - ours).square().mean())
    for number, value in enumerate(expected):
        distiller.enter(number)
        terms = distiller((WIDE, LABELS), 0.5)
        assert list(terms.losses) == ["InDistill.mse"]
        torch.testing.assert_close(terms.total(), value)


def test_an_equal_network_has_nothing_to_learn() -> None:
    teacher = cnn(4, 6, 8)
    method = InDistill(teacher)
    distiller = built(copy.deepcopy(teacher), method).eval()
    assert [getattr(method, f"selected{i}") for i in range(3)] == [None] * 3
    for number in range(3):
        distiller.enter(number)
        assert distiller((WIDE, LABELS), 0.5).total() == 0


def test_permuted_filters_select_the_same_maps() -> None:
    teacher, student = cnn(8, 12, 16, seed=1), cnn(4, 6, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    permuted = copy.deepcopy(teacher)
    for name in ("conv1", "bn1"):
        for tensor in (*permuted.get_submodule(name).parameters(), *permuted.get_submodule(name).buffers()):
            if tensor.ndim:
                tensor.data = tensor.data[order]
    methods = [InDistill(network, stages=("pool1",), teacher_stages=("pool1",)) for network in (teacher, permuted)]
    targets = []
    for method in methods:
        built(copy.deepcopy(student), method)
        targets.append(method.target(0, WIDE))
    assert sorted(order[methods[1].selected0].tolist()) == methods[0].selected0.tolist()
    # The same channels, in the permuted network's order.
    torch.testing.assert_close(targets[1][:, order[methods[1].selected0].argsort()], targets[0])


def test_a_phase_trains_its_layers_and_both_forwards_end_there() -> None:
    teacher, student = cnn(8, 12, 16, seed=1), cnn(4, 6, 8)
    distiller = built(student, InDistill(teacher), KD(cnn(4, 4, 4, seed=3)))
    ran: set[str] = set()
    for name, network in (("student", student), ("teacher", teacher)):
        for i in (1, 2, 3):
            network.get_submodule(f"conv{i}").register_forward_hook(lambda *_, it=f"{name}.conv{i}": ran.add(it))
    for number in range(3):
        distiller.enter(number)
        step(distiller)  # the first step of a phase counts how often modules run
        ran.clear()
        assert list(step(distiller).losses) == ["InDistill.mse"]
        assert ran == {f"{network}.conv{i}" for network in ("student", "teacher") for i in range(1, number + 2)}
        for name, parameter in distiller.named_parameters():
            layer = int(name.split(".")[1][-1]) if name.split(".")[1][:-1] in ("conv", "bn") else 9
            if layer > number + 1:
                assert parameter.grad is None, name
            elif not name.endswith(f"conv{layer}.bias"):  # which batch norm takes away again
                assert parameter.grad.abs().max() > 0, name
    distiller.enter(None)
    assert set(step(distiller).losses) == {"task", "KD.kl"}


@pytest.mark.parametrize("options", [{}, {"a": 0}])
def test_the_phase_table(options: dict[str, int]) -> None:
    distiller = built(cnn(4, 6, 8), InDistill(cnn(8, 12, 16), **options))

    def names(epochs: int) -> list[str]:
        found = []
        for epoch in range(epochs):
            distiller.epoch_start(epoch, epochs)
            found.append(distiller.phase.name if distiller.phase else "main")
        return found

    lengths = (3, 4, 5) if not options else (1, 2, 3)
    warm = [f"layer {i}" for i, length in enumerate(lengths, 1) for _ in range(length)]
    assert names(70) == [*warm, *["main"] * (70 - len(warm))]
    assert names(140) == [*(name for name in warm for _ in range(2)), *["main"] * (140 - 2 * len(warm))]
    assert names(4) == ["layer 1", "layer 2", "layer 3", "main"]


def test_without_stages_it_is_the_main_training_alone() -> None:
    teacher = cnn(8, 12, 16, seed=1)
    distiller = built(cnn(4, 6, 8), InDistill(teacher, stages=()), KD(teacher))
    assert distiller.phases == []
    terms = step(distiller)
    plain = built(cnn(4, 6, 8), KD(teacher))
    assert terms.losses.keys() == step(plain).losses.keys()
    torch.testing.assert_close(terms.total(), step(plain).total())


def test_training_leaves_the_teacher_as_it_was_and_makes_the_student_alike() -> None:
    teacher = cnn(8, 12, 16, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    distiller = built(cnn(4, 6, 8), InDistill(teacher))
    optimizer = torch.optim.Adam(distiller.parameters(), 0.01)
    for number in (0, 1, 2, None):
        distiller.enter(number)
        values = []
        for _ in range(20 if number is not None else 2):
            values.append(float(step(distiller).total().detach()))
            optimizer.step()
        assert number is None or values[-1] < 0.8 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert list(distiller.strip(prove_export=False).state_dict()) == list(cnn(4, 6, 8).state_dict())


def test_selection_equals_a_sliced_residual_stage() -> None:
    torch.manual_seed(1)
    teacher = timm.create_model("cifar_resnet20", num_classes=3, width=0.5).double().eval()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    student = timm.create_model("cifar_resnet20", num_classes=3, width=0.25).double()
    method = InDistill(teacher)
    built(student, method)
    with torch.no_grad():
        x = teacher.layer1(teacher.act1(teacher.bn1(teacher.conv1(WIDE))))
        x = teacher.layer2[1](teacher.layer2[0](x))
        block, kept = teacher.layer2[2], method.selected1
        assert len(kept) == 8
        norms = block.conv2.weight.abs().sum(dim=(1, 2, 3))
        assert set(kept.tolist()) == set(norms.topk(8).indices.tolist())
        inner = block.act1(block.bn1(block.conv1(x)))
        residual = nn.functional.conv2d(inner, block.conv2.weight[kept], padding=1)
        norm = block.bn2
        residual = nn.functional.batch_norm(
            residual, norm.running_mean[kept], norm.running_var[kept], norm.weight[kept], norm.bias[kept], eps=norm.eps
        )
        torch.testing.assert_close(method.target(1, WIDE), torch.relu(residual + x[:, kept]))


def test_the_official_target_has_no_shift_and_the_batchs_statistics() -> None:
    teacher = cnn(8, 12, 16, seed=1)
    method = InDistill(teacher, official_bn=True)
    built(cnn(4, 6, 8), method)
    made = nn.functional.conv2d(maps(teacher.eval())[0], teacher.conv2.weight, teacher.conv2.bias)[:, method.selected1]
    mean, variance = made.mean(dim=(0, 2, 3), keepdim=True), made.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
    gamma = teacher.bn2.weight[method.selected1].view(1, -1, 1, 1)
    expected = nn.functional.max_pool2d(torch.relu(gamma * (made - mean) / (variance + teacher.bn2.eps).sqrt()), 2)
    torch.testing.assert_close(method.target(1, WIDE), expected)
    exact = InDistill(teacher)
    built(cnn(4, 6, 8), exact)
    assert (exact.target(1, WIDE) - expected).abs().max() > 0.1


@pytest.mark.parametrize("criterion", ["l1", "l2", "gamma"])
def test_criteria(criterion: str) -> None:
    teacher = cnn(8, 12, 16, seed=4)
    with torch.no_grad():
        # One filter wins by each: a large weight alone, many middling ones, or a large scale behind it.
        teacher.conv1.weight.fill_(0.01)
        teacher.conv1.weight[2] = 0.2
        teacher.conv1.weight[5, 0, 0, 0] = 3.0
        teacher.bn1.weight[6] = -9.0
    method = InDistill(teacher, criterion=criterion, stages=("pool1",), teacher_stages=("pool1",))
    built(cnn(1, 6, 8), method)
    assert method.selected0.tolist() == [{"l1": 2, "l2": 5, "gamma": 6}[criterion]]


def test_maps_of_other_sizes_are_pooled() -> None:
    torch.manual_seed(1)
    teacher = Teacher(timm.create_model("cifar_resnet20", num_classes=3, width=0.5).double())
    method = InDistill(teacher, stages=("pool1", "pool3"), teacher_stages=("layer1", "layer3"))
    student = cnn(8, 12, 16)
    distiller = built(student, method).eval()
    for number, size in enumerate((15, 2)):
        distiller.enter(number)
        ours, theirs = maps(student)[2 * number], method.target(number, WIDE)
        assert theirs.shape[2] > size
        expected = (nn.functional.adaptive_avg_pool2d(theirs, size) - ours).square().mean()
        torch.testing.assert_close(distiller((WIDE, LABELS), 0.5).total(), expected)


def test_a_wider_student_is_refused_or_adapted() -> None:
    teacher = cnn(8, 12, 16, seed=1)
    with pytest.raises(AttarError, match=r"'pool2' has 20 channels and the teacher's 'pool2' only 12 .* be 'adapt'"):
        built(cnn(4, 20, 8), InDistill(teacher))
    method = InDistill(teacher, wider="adapt")
    distiller = built(cnn(4, 20, 8), method)
    assert [type(adapter).__name__ for adapter in method.adapters] == ["Identity", "Conv2d", "Identity"]
    assert method.adapters[1].weight.shape == (12, 20, 1, 1)
    distiller.enter(1)
    step(distiller)
    assert method.adapters[1].weight.grad.abs().max() > 0
    torch.testing.assert_close(method.target(1, WIDE), maps(teacher)[1])
    distiller.enter(None)
    step(distiller)
    assert method.adapters[1].weight.grad is None


def test_under_autocast_maps_are_compared_in_full_precision() -> None:
    teacher, student = cnn(8, 12, 16, seed=1).float(), cnn(4, 6, 8).float()
    for official in (False, True):
        distiller = built(copy.deepcopy(student), InDistill(teacher, official_bn=official), images=WIDE.float())
        for number in range(3):
            distiller.enter(number)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = distiller((WIDE.float(), LABELS), 0.5).losses["InDistill.mse"]
            assert loss.dtype == torch.float32
            assert loss.isfinite()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: InDistill([]), "InDistill needs at least one trained teacher"),
        (lambda: InDistill([Net(), Net()]), "of one teacher, not of 2"),
        (lambda: InDistill(cnn(8, 12, 16), a=-1), "a cannot be -1"),
        (lambda: InDistill(cnn(8, 12, 16), a=30), r"31 \+ 32 \+ 33 epochs leaves none of 70"),
        (lambda: InDistill(cnn(8, 12, 16), criterion="l3"), "'l1', 'l2' or 'gamma', not 'l3'"),
        (lambda: InDistill(cnn(8, 12, 16), wider="cut"), "'refuse' or 'adapt' a wider student, not 'cut'"),
        (lambda: InDistill(cnn(8, 12, 16), stages=("pool1",)), "cannot pair the student's layers"),
        (lambda: InDistill(cnn(8, 12, 16), stages=("pool4",)), "did you mean 'pool"),
        (
            lambda: InDistill(HandWritten(3).double(), official_bn=True),
            r"official_bn needs stages of convolution, .* which the teacher's 'shortcut' is not",
        ),
        (lambda: InDistill(small_vit()), "no convolution inside the teacher's 'blocks.1' whose filters are its 192"),
        (
            lambda: InDistill(Bare(3).double(), criterion="gamma", stages=("pool1",), teacher_stages=("low",)),
            "no batch norm behind 'low.0'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(cnn(4, 6, 8), make())


class Bare(Net):
    """Convolutions without batch norm."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, depth=4
    ).double()  # fmt: skip


def test_the_student_is_not_its_own_teacher() -> None:
    network = cnn(4, 6, 8)
    with pytest.raises(AttarError, match="the student itself"):
        built(network, InDistill(network))


class TestAViTFromACNN(MethodContract):
    """Selection where the teacher is wide enough, adaptors where it is not, maps of other sizes."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return InDistill(HandWritten(self.num_classes), wider="adapt")

    def student(self) -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", num_classes=self.num_classes, img_size=32, patch_size=8, depth=4
        )


class Wide(nn.Module):
    """One stage with more channels than a tiny transformer's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 200, 5, 4), nn.BatchNorm2d(200), nn.ReLU(inplace=True))
        self.fc = nn.Linear(200, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.wide(images).mean(dim=(2, 3)))


class TestACNNFromAViT(MethodContract):
    """Only adaptors: a transformer has no filters to compare."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        network = timm.create_model(
            "vit_tiny_patch16_224", num_classes=self.num_classes, img_size=64, patch_size=16, depth=2
        )
        teacher = Teacher(network, image_size=64)
        return InDistill(teacher, wider="adapt", stages=("wide",), teacher_stages=("blocks.1",))

    def student(self) -> nn.Module:
        return Wide(self.num_classes)


def test_images_of_another_size_reach_the_teacher() -> None:
    torch.manual_seed(3)
    teacher = Teacher(cnn(8, 12, seed=1), image_size=24)
    method = InDistill(teacher)
    distiller = built(Net(batch_norm=True).double(), method, images=IMAGES)
    distiller.enter(1)
    assert step(distiller, IMAGES).total() > 0
    assert method.target(1, IMAGES).shape == (6, 8, 4, 4)
