"""SLA: joint labels of class and rotation make an ensemble of one network, which teaches its plain classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, kl_divergence
from attar.functional.label_augmentation import Transform, aggregated_logits, joint_labels, transformed, versions_of
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["SLA", "Aggregated"]


class SLA(Method):
    """SLA, Self-supervised Label Augmentation: an ensemble over an image's rotations teaches the plain classifier.

    Idea: every image is turned by 0, 90, 180 and 270 degrees. Instead of learning to ignore the rotation, a second
    head on the student's embedding tells class and rotation together. Averaging its class logits over the versions,
    each read at its known rotation, is an ensemble of one network; it is distilled into the student's own classifier
    on the upright image (SLA+SD). Deployed is the plain student; or keep the ensemble, or the second head.

    Definition, with M versions t_j x (t_0 the image), embedding f, joint head u of K M outputs, student logits z:
        L = w (1/(N M)) sum_n sum_j CE(u f(t_j x_n), M y_n + j) + T^2 KL(softmax(sg s / T) || softmax(z / T)) + CE(z, y)
        s[n, i] = (1/M) sum_j (u f(t_j x_n))[M i + j]
    Terms: `task` is CE(z, y), `joint` the first, unweighted, `kl` the T^2-scaled KL. It never reaches the joint head.

    Shapes: images [N, C, H, W], joint logits [N M, K M]. Unit: nats. Data: one view, class indices.

    Cost: M - 1 more student passes an image and D K M parameters while training, 4 times plain training with
    rotations. Deployed: nothing; the ensemble ("SLA.aggregated") M passes.

    When it helps: few images a class, and objects that have an upright position. It costs M times the training, so
    compare at equal cost. In a short training the joint labels take more of a small network than they give: ResNet-20
    lost 2 to 3 points (benchmarks/self_distillation.md). Colour permutations suit images whose colours carry meaning.

    Args:
        transform: "rotation" (M = 4), "rotation2" (0 and 180 degrees), "color_perm" (6 orders of the channels),
            "color_perm3", or both: "rot_color_perm6", "rot_color_perm12", "rot_color_perm24".
        temperature: T; the released code's default of 1 does not soften.
        kl_weight: multiplies `kl`.
        large_loss: w = M instead of 1 (a sum over versions): the README's advice for ImageNet and iNaturalist.
        distil: False trains the joint head alone (`task` has weight 0): deploy "SLA.single" or "SLA.aggregated".
        passes: "others": the upright version is read in the student's own pass, the others in a second one. "all":
            every version in the second pass, one more image, as FRSKD's code does it.

    Raises:
        AttarError: images that are not square or not RGB where the transformation needs it; mixed labels.

    Source: Lee, Hwang, Shin, "Self-supervised Label Augmentation via Input Transformations", ICML 2020, and its
    released code. Differences: there all versions pass the network as one batch, which batch norm sees whole; here
    the upright images are one batch, which all methods share, and the rest another.
    """

    needs = frozenset({"labels"})
    not_dense = "its second head names class and rotation of the whole image"

    def __init__(
        self,
        *,
        transform: Transform = "rotation",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        large_loss: bool = False,
        distil: bool = True,
        passes: Literal["others", "all"] = "others",
    ) -> None:
        super().__init__()
        if transform not in get_args(Transform):
            raise AttarError(f"SLA's transform is one of {', '.join(get_args(Transform))}, not '{transform}'.")
        if temperature <= 0:
            raise AttarError(f"SLA's temperature must be positive, not {temperature}.")
        if passes not in ("others", "all"):
            raise AttarError(f"SLA's passes are 'others' or 'all', not '{passes}'.")
        self.transform = transform
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.large_loss = large_loss
        self.distil = distil
        self.passes = passes
        self.versions = versions_of(transform)
        self.claims = {"joint labels": "SLA teaches them to the student"}
        if not distil:
            self.claims |= {"task weight": "SLA without distillation trains its joint head alone"}
        self._classifier: str | None = None

    def build(self, probe: Probe) -> None:
        """Make the joint head on the student's embedding."""
        channels, height, width = probe.anatomy.input_shape
        check_transform("SLA", self.transform, channels, height, width)
        self.joint_head = nn.Linear(probe.anatomy.embedding_dim, probe.task.num_classes * self.versions)
        self._classifier = probe.anatomy.classifier if _classifier_speaks_last(probe) else None
        if self._classifier is None and not self.distil:
            raise AttarError(
                f"SLA without distillation deploys its joint head in place of the classifier, but no linear layer "
                f"gives the logits of {type(probe.student).__name__}: leave distil on."
            )

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The embedding, or the stages, whose last is pooled, where the student has none."""
        return [anatomy.embedding] if anatomy.embedding is not None else super().taps(anatomy)

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `joint` and, with distillation, `kl`."""
        if batch.labels is None:
            raise AttarError("SLA needs class indices, but the batch has soft or mixed targets alone.")
        versions = transformed(outputs.images, self.transform)
        if self.passes == "all":
            embedding = outputs.student(versions.flatten(0, 1)).embedding
        else:
            upright = outputs.embedding.unsqueeze(1)
            others = outputs.student(versions[:, 1:].flatten(0, 1)).embedding
            others = others.reshape(len(upright), self.versions - 1, -1)
            embedding = torch.cat([upright, others], dim=1).flatten(0, 1)
        joint = self.joint_head(embedding)
        losses = {"joint": F.cross_entropy(full_precision(joint), joint_labels(batch.labels, self.versions))}
        if self.distil:
            losses["kl"] = kl_divergence(outputs.logits, aggregated_logits(joint, self.versions), self.temperature)
        return losses

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        joint = float(self.versions) if self.large_loss else 1.0
        return {"joint": joint, "kl": self.kl_weight} if self.distil else {"joint": joint}

    def task_weight(self, progress: Tensor) -> float:
        """1, or 0 where the joint head is trained alone."""
        return 1.0 if self.distil else 0.0

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """SLA+AG, the ensemble over versions, and SLA+SI, the joint head on the image as it is.

        None for a student whose logits are not the output of one linear layer: the joint head has no place in it.
        """
        if self._classifier is None:
            return {}
        joint = _with_classifier(student, self._classifier, self.joint_head)
        single = _with_classifier(student, self._classifier, _Upright(self.joint_head, self.versions))
        return {"aggregated": Aggregated(joint, self.transform), "single": single}


def check_transform(method: str, transform: Transform, channels: int, height: int, width: int) -> None:
    """Refuse images that a transformation cannot turn or permute."""
    if transform in ("rotation", "rot_color_perm12", "rot_color_perm24") and height != width:
        raise AttarError(
            f"{method} turns images by 90 degrees, which needs square ones, not {height} x {width}: "
            "crop them square or use transform=rotation2."
        )
    if "color" in transform and channels != 3:
        raise AttarError(f"{method} permutes the channels of RGB images, but these have {channels}: use rotation.")


def _classifier_speaks_last(probe: Probe) -> bool:
    """Whether the student's logits are what its classifier returned, so that another one can take its place."""
    if probe.anatomy.classifier is None:
        return False
    modes = {module: module.training for module in probe.student.modules()}
    said: list[Tensor] = []
    classifier = probe.student.get_submodule(probe.anatomy.classifier)
    handle = classifier.register_forward_hook(lambda module, args, output: said.append(output))
    probe.student.eval()
    with torch.no_grad():
        logits = probe.student(probe.images)
    handle.remove()
    for module, mode in modes.items():
        module.training = mode
    return len(said) == 1 and torch.equal(said[0], logits)


class Aggregated(nn.Module):
    """SLA+AG: the network that tells joint labels, run on all M versions, images [N, C, H, W] -> logits [N, K]."""

    def __init__(self, network: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean over versions of the logits, each read at its own transformation."""
        joint = self.network(transformed(images, self.transform).flatten(0, 1))
        return aggregated_logits(joint, versions_of(self.transform))


class _Upright(nn.Module):
    """The class logits of a joint head at t_0: [N, D] -> [N, K]."""

    def __init__(self, head: nn.Linear, versions: int) -> None:
        super().__init__()
        self.head, self.versions = head, versions

    def forward(self, embedding: Tensor) -> Tensor:
        logits: Tensor = self.head(embedding)[:, :: self.versions]
        return logits


def _with_classifier(network: nn.Module, path: str, classifier: nn.Module) -> nn.Module:
    """Return a network of the same modules with another classifier; the given network is left as it is."""
    name, _, rest = path.partition(".")
    twin = copy.copy(network)
    twin._modules = dict(network._modules)
    child = network.get_submodule(name)
    twin._modules[name] = _with_classifier(child, rest, classifier) if rest else classifier
    return twin
