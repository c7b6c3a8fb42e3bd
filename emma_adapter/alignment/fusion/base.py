"""Fusion, the base class of all fusions, and their registration by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from . import registry
from .dispatch import Dispatch
from .packed_images import Packing, by_grid

if TYPE_CHECKING:
    from ..config import EmmaConfig


class Fusion(nn.Module, ABC):
    """Base class of fusions: how an instruction enters visual tokens.

    A subclass takes the config as its only constructor argument, and must return ``visual_tokens`` bit for bit
    at initialisation. Register it with :func:`register_fusion`.
    """

    #: True if the weights belong to positions of the instruction, so that the encoded padding of a text tower
    #: counts as input (the paper's ``linear``) instead of being masked.
    reads_padding: ClassVar[bool] = False
    #: True if the number of visual tokens is fixed by the weights.
    fixed_num_visual_tokens: ClassVar[bool] = False
    #: True if there is a Triton kernel, and ``self.dispatch`` is asked which implementation runs.
    has_kernel: ClassVar[bool] = False

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        self.use_kernel(config)

    def use_kernel(self, config: EmmaConfig) -> None:
        """Choose the implementation as ``config.kernel`` says, and start the report anew.

        Raises:
            ConfigError: if that is ``"triton"`` and the fusion has no kernel.
        """
        if config.kernel == "triton" and not self.has_kernel:
            raise ConfigError(
                f'fusion={config.fusion!r} has no Triton kernel; EmmaConfig.kernel must be "auto" or "eager"'
            )
        self.dispatch = Dispatch(config.fusion, config.kernel)

    @property
    def trains(self) -> bool:
        """True if a backward may follow.

        Not only where gradients are recorded: reentrant checkpointing computes a call without them, and later again
        with them.
        """
        return self.training or torch.is_grad_enabled()

    @abstractmethod
    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Align tokens: ``[B, N, D], [B, T, Dt], bool [B, T] or None (all valid), (height, width) -> [B, N, D]``."""

    def forward_packed(
        self, visual_tokens: Tensor, instruction_tokens: Tensor, instruction_mask: Tensor | None, packing: Packing
    ) -> Tensor:
        """Align images of any size in one tensor: ``[M, D], [R, T, Dt], bool [R, T] or None (all valid) -> [M, D]``."""
        return by_grid(self, visual_tokens, instruction_tokens, instruction_mask, packing)


FusionClass = TypeVar("FusionClass", bound=type[Fusion])


def register_fusion(name: str) -> Callable[[FusionClass], FusionClass]:
    """Register the decorated :class:`Fusion` for ``EmmaConfig(fusion=name)``.

    Raises:
        ConfigError: if the name is not a text or taken by another class, or the class is no :class:`Fusion`.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f'the name of a fusion must be a non-empty text, as @register_fusion("mine"); got {name!r}')

    def register(cls: FusionClass) -> FusionClass:
        if not (isinstance(cls, type) and issubclass(cls, Fusion)):
            raise ConfigError(f"a fusion must be a subclass of emma_adapter.Fusion; got a {type(cls).__name__}")
        if registry.FUSIONS.setdefault(name, cls) is not cls:
            raise ConfigError(
                f"a fusion named {name!r} is registered already: {registry.FUSIONS[name]!r}; choose another name"
            )
        return cls

    return register


def fusion_class(name: str) -> type[Fusion]:
    return registry.FUSIONS[name]
