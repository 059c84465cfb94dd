"""A judge of FashionMNIST samples: a small classifier, trained on the real training images.

It says whether a sample is of the class that was asked for, and gives the features of a Fréchet distance.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from skipdit.checkpoints.loading import load_weights
from skipdit.data.images import FashionMNIST
from skipdit.metrics import frechet_distance
from skipdit.utils.errors import UserError
from skipdit.utils.files import whole_file
from skipdit.utils.pixels import to_float

IMAGE_SIZE, CLASSES = 32, FashionMNIST.num_classes
EPOCHS, BATCH = 4, 128  # of the classifier's training
LEAST_ACCURACY = 0.9  # a classifier that errs more often is no judge


class Classifier(nn.Module):
    """FashionMNIST classifier on RGB images of 32x32: five convolutions, mean over places, linear."""

    def __init__(self, num_classes: int = CLASSES):
        super().__init__()
        widths, strides = [3, 16, 32, 64, 64, 64], [1, 2, 2, 2, 1]
        layers = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """float (N, 3, 32, 32) in [-1, 1] -> (N, 64)"""
        return self.trunk(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """float (N, 3, 32, 32) in [-1, 1] -> logits (N, classes)"""
        return self.head(self.features(images))


def load_images(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """All real images, uint8 (N, 3, 32, 32), and their labels (N,)."""
    batches = list(DataLoader(FashionMNIST(root, IMAGE_SIZE, train), 1000))
    return torch.cat([batch["image"] for batch in batches]), torch.cat([batch["label"] for batch in batches])


def train_classifier(images: Tensor, labels: Tensor, device: torch.device) -> Classifier:
    """Fit a classifier to uint8 images (N, 3, 32, 32), half of them flipped at random."""
    torch.manual_seed(0)
    model = Classifier().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    total = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=total)
    order = torch.cat([torch.randperm(len(images)) for _ in range(EPOCHS)])
    progress = tqdm(order.split(BATCH)[:total], desc="classifier", unit="step")
    for rows in progress:
        batch = to_float(images[rows])
        flip = torch.rand(len(batch), 1, 1, 1) < 0.5
        logits = model(torch.where(flip, batch.flip(-1), batch).to(device))
        loss = F.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


class Judge:
    """A classifier that has proven itself on the real test images, and its features of them."""

    def __init__(self, classifier: Classifier, images: Tensor, labels: Tensor):
        self.classifier = classifier.eval()
        self.real, predicted = self._look(images)
        self.test_accuracy = _share(predicted == labels)

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, 32, 32) -> features (N, 64) and predicted classes (N,), on the CPU."""
        device = self.classifier.head.weight.device
        features = [self.classifier.features(to_float(part).to(device)) for part in images.split(500)]
        features = torch.cat(features)
        return features.cpu(), self.classifier.head(features).argmax(1).cpu()

    def scores(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """`accuracy` with `labels` as truth, and `frechet` distance to the real test images."""
        features, predicted = self._look(images)
        return {"accuracy": _share(predicted == labels), "frechet": frechet_distance(features, self.real)}


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def load_judge(path: Path, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], device: torch.device) -> Judge:
    """The judge kept at `path`, or a newly trained one, kept there. Raises ValueError if it is not fit to judge."""
    if path.exists():
        classifier = Classifier().to(device)
        load_weights(classifier, path)
    else:
        classifier = train_classifier(*train, device)
        with whole_file(path) as partial, open(partial, "wb") as file:
            torch.save(classifier.state_dict(), file)
    judge = Judge(classifier, *test)
    print(f"classifier: {judge.test_accuracy:.2%} of the real test images right")
    if judge.test_accuracy < LEAST_ACCURACY:
        raise UserError(
            f"a classifier below {LEAST_ACCURACY:.0%} cannot judge samples; delete {path} to train it anew, "
            f"with more EPOCHS if it happens again"
        )
    return judge
