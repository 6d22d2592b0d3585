"""SimSiam: no negatives, no queue and no key encoder (Chen and He, CVPR 2021, arXiv 2011.10566).

Letters: B clips in a batch, C channels, D embedding size.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from dclr.kernels import Views
from dclr.methods.encoder import Encoder
from dclr.methods.method import Method
from dclr.models import pool

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import MethodConfig, ModelConfig


class Output(NamedTuple):
    """The results of a step. Only `loss` carries a gradient."""

    loss: Tensor  # () mean negative cosine of prediction and projection, from -1 to 1
    spread: Tensor  # () see `spread`


class SimSiam(Method):
    """The prediction from one clip of a video must equal the projection of the other clip, which gets no gradient.

    With a backbone f, a projector g and a predictor h, z = g(pool(f(v))) and p = h(z) of the rgb views v of both clips,
        loss = -(cosine(p, z') + cosine(p', z)) / 2.
    The gradient flows through p and p' only.

    Published sizes are D = 2048 and a hidden layer of 512 in h. Here D is --embedding-dim, and the hidden layer has
    D / 4 channels. The authors normalise over all GPUs (SyncBatchNorm). Here each process normalises its own clips.
    """

    smallest_micro_batch = 2

    def __init__(self, model: "ModelConfig", method: "MethodConfig", seed: int = 0) -> None:
        super().__init__()
        self.query = Encoder(model, method.embedding_dim, pairs=())
        C, D = self.query.backbone.feature_dim, method.embedding_dim
        # As in the authors' code, the last normalisation has no weight and no bias.
        last = (nn.Linear(C, D, bias=False), nn.BatchNorm1d(D, affine=False))
        self.project = nn.Sequential(*layer(C, C), *layer(C, C), *last)
        self.predict = nn.Sequential(*layer(D, D // 4), nn.Linear(D // 4, D))

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """Compute one step. The two clips of the videos are two batches with batch statistics of their own."""
        first, second = (self.project(pool(self.query.backbone(views.rgb))) for views in (query, key))
        cosines = [
            F.cosine_similarity(self.predict(own).float(), other.detach().float()).mean()
            for own, other in ((first, second), (second, first))
        ]
        return Output(-(cosines[0] + cosines[1]) / 2, spread(first))

    def terms(self, output: Output) -> dict[str, Tensor]:
        """Return the loss and the spread, each ()."""
        return {**super().terms(output), "spread": output.spread}


def layer(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a linear layer, its batch normalisation and ReLU."""
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


def spread(projections: Tensor) -> Tensor:
    """Return () sqrt(D) times the mean standard deviation of the L2-normalised projections (B, D), without gradient.

    It is about 1 if they are spread over the sphere, and 0 if they are all the same: the network has collapsed.
    """
    unit = F.normalize(projections.detach().float(), dim=1)
    return unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5
