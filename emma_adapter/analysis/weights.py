"""Shares of image and instruction in the weights of ``linear``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..alignment.fusion import LinearFusion
from ..alignment.module import EmmaAlignment
from ..errors import AnalysisError
from .observing import Model, alignment_of


@dataclass(frozen=True, eq=False)
class WeightShares:
    """Shares of the weights in ``V' = W_img V + W_txt T' + b``, with N visual tokens and T instruction positions.

    All are float64. How much a position contributes also depends on how large its input is, which isn't considered.
    """

    #: ``[N]``, share of ``sum_j |W_img[n, j]|`` in the absolute weights of output token n, without the bias.
    image: NDArray[np.float64]
    #: ``[N, T]``, share of ``|W_txt[n, t]|`` in the same sum; together with ``image``, each row adds up to 1.
    instruction: NDArray[np.float64]
    #: ``[N]``, Euclidean norm of each column of ``W_img``.
    image_norms: NDArray[np.float64]
    #: ``[T]``, Euclidean norm of each column of ``W_txt``: the paper finds those of early positions the largest
    #: (arXiv 2410.02080, analysis of the alignment).
    instruction_norms: NDArray[np.float64]


def weight_shares(model: Model | EmmaAlignment) -> WeightShares:
    """Return the shares of image and instruction in the weights of an adapter with ``fusion="linear"``.

    Args:
        model: a patched model, its handle, or an :class:`~emma_adapter.EmmaAlignment`.

    Raises:
        PatchError: if the model is not patched.
        AnalysisError: if its active adapter has another fusion.
    """
    alignment = alignment_of(model)
    fusion = alignment.fusion
    if not isinstance(fusion, LinearFusion):
        raise AnalysisError(
            f'weights by position are what fusion="linear" has; this adapter\'s is {alignment.config.fusion!r}: '
            "attention_mass tells which positions it attends to"
        )
    with torch.no_grad():
        text = fusion.text_weight.detach().double().cpu()
        if hasattr(fusion, "image_weight"):
            image = fusion.image_weight.detach().double().cpu()
        else:
            image = fusion.image_up.detach().double().cpu() @ fusion.image_down.detach().double().cpu()
        image = image + torch.eye(len(image), dtype=torch.float64)
    image_sum, text_abs = image.abs().sum(1), text.abs()
    # Zero only where W_img cancels the identity and W_txt is zero, so that the whole token is bias.
    total = (image_sum + text_abs.sum(1)).clamp_min(torch.finfo(torch.float64).tiny)
    return WeightShares(
        image=(image_sum / total).numpy(),
        instruction=(text_abs / total[:, None]).numpy(),
        image_norms=image.norm(dim=0).numpy(),
        instruction_norms=text.norm(dim=0).numpy(),
    )
