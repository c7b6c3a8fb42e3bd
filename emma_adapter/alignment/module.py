"""EmmaAlignment: the adapter's module, usable on its own."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, ShapeError
from .config import EmmaConfig
from .fusion import fusion_class
from .fusion.dispatch import Kernel, KernelUse
from .fusion.packed_images import Grid, Packing
from .moda_weights import read_moda
from .official_weights import read_official


class EmmaAlignment(nn.Module):
    """Mixes an instruction into visual tokens; the identity, bit for bit, until it is trained.

    Weights are float32; the work is done in the dtype of the visual tokens. Values that are not finite are returned as
    they are and left out of everything else: ``attention`` and ``modulation`` leave out the whole token, ``linear`` the
    value alone. NaN in a valid instruction token, and weights that float16 can't hold, turn what they reach into NaN.

    Raises:
        ConfigError: if ``config`` lacks a size that the fusion needs.
    """

    def __init__(self, config: EmmaConfig) -> None:
        super().__init__()
        if not isinstance(config, EmmaConfig):
            raise ConfigError(f"an EmmaAlignment is built from an EmmaConfig; got a {type(config).__name__}")
        for name in ("visual_dim", "instruction_dim"):
            if getattr(config, name) is None:
                raise ConfigError(f"EmmaConfig.{name} must be given to build an EmmaAlignment; patch_model infers it")
        self.config = config
        self.fusion = fusion_class(config.fusion)(config)

    def forward(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None = None,
        *,
        grid: Grid | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Align visual tokens with the instruction.

        Args:
            visual_tokens: ``[B, N, D]``, any floating dtype; with ``packing``, ``[M, D]``.
            instruction_tokens: ``[B, T, Dt]``; cast to the dtype of the visual tokens.
            instruction_mask: ``[B, T]``, true or 1 at valid tokens (a key padding mask in the sense of
                transformers' ``attention_mask``); None if all are valid.
            grid: ``(height, width)`` of the image in visual tokens, if it differs from the config's.
            packing: how images of different sizes lie one after another, and each one's row of
                ``instruction_tokens``.

        Returns:
            A tensor of the shape and dtype of ``visual_tokens``.

        Raises:
            ShapeError: if the tensors don't fit each other or the config.
            KernelError: if the config asks for Triton kernels that can't compute this.
        """
        self._check(visual_tokens, instruction_tokens, instruction_mask, packing)
        if grid is not None and not _is_grid_of(visual_tokens, grid):
            raise ShapeError(
                f"grid={grid!r} should be the (height, width) of an image of {visual_tokens.shape[1]} visual tokens"
            )
        if instruction_mask is not None:
            instruction_mask = instruction_mask.to(visual_tokens.device, torch.bool)
        instruction_tokens = instruction_tokens.to(visual_tokens.device, visual_tokens.dtype)
        if instruction_tokens.shape[1] == 0:
            # An instruction without tokens means the same as a masked one.
            instruction_tokens = instruction_tokens.new_zeros(len(instruction_tokens), 1, instruction_tokens.shape[2])
            instruction_mask = instruction_tokens.new_zeros(instruction_tokens.shape[:2], dtype=torch.bool)
        if packing is not None:
            aligned = self.fusion.forward_packed(visual_tokens, instruction_tokens, instruction_mask, packing)
        else:
            aligned = self.fusion(visual_tokens, instruction_tokens, instruction_mask, grid)
        return aligned.to(visual_tokens.dtype)

    def use_kernel(self, kernel: Kernel) -> None:
        """Change ``EmmaConfig.kernel`` and start the report anew.

        Raises:
            ConfigError: if the fusion has no Triton kernel and ``kernel`` is ``"triton"``.
        """
        config = self.config.replace(kernel=kernel)
        self.fusion.use_kernel(config)
        self.config = config

    def kernel_report(self) -> tuple[KernelUse, ...]:
        """Return what computed the calls so far, one entry for each kind of call."""
        return self.fusion.dispatch.report()

    @classmethod
    def from_official(cls, path: str | PathLike[str]) -> EmmaAlignment:
        """Return the trained alignment from the authors' ``vision_tower.bin`` (github.com/SaraGhazanfari/EMMA).

        The towers in that file are ignored; it is read without running any code in it.

        Raises:
            CheckpointError: if the file is not such a checkpoint.
        """
        config, state_dict = read_official(path)
        alignment = cls(config)
        alignment.load_state_dict(state_dict)
        return alignment

    @classmethod
    def from_moda(cls, source: str | PathLike[str], *, num_heads: int | None = None) -> EmmaAlignment:
        """Return the trained module of a MoDA checkpoint (arXiv 2506.01850, github.com/waybarrios/MoDA).

        Only the module is read; its checkpoints hold a language model that was trained with it.

        Args:
            source: a folder of safetensors, or one such file.
            num_heads: attention heads. Default: the number in the folder's ``config.json``, or 16.

        Raises:
            CheckpointError: if ``source`` has no such module.
        """
        config, state_dict = read_moda(source, num_heads)
        try:
            alignment = cls(config)
            alignment.load_state_dict(state_dict)
        except (ConfigError, RuntimeError) as error:
            raise CheckpointError(f"{source}: the tensors of MoDA's module don't fit each other: {error}") from error
        return alignment

    def _check(
        self,
        visual_tokens: Tensor,
        instruction_tokens: Tensor,
        instruction_mask: Tensor | None,
        packing: Packing | None,
    ) -> None:
        config = self.config
        for name, value in (("visual_tokens", visual_tokens), ("instruction_tokens", instruction_tokens)):
            if not isinstance(value, Tensor):
                raise ShapeError(f"{name} must be a tensor; got a {type(value).__name__}")
        shape = f"[B, N, {config.visual_dim}]" if packing is None else f"[M, {config.visual_dim}] with packing"
        if visual_tokens.ndim != (3 if packing is None else 2) or visual_tokens.shape[-1] != config.visual_dim:
            raise ShapeError(f"visual_tokens must be {shape}; got {list(visual_tokens.shape)}")
        if not visual_tokens.is_floating_point():
            raise ShapeError(f"visual_tokens must be floating-point; got {visual_tokens.dtype}")
        if instruction_tokens.ndim != 3 or instruction_tokens.shape[-1] != config.instruction_dim:
            raise ShapeError(
                f"instruction_tokens must be [B, T, {config.instruction_dim}]; got {list(instruction_tokens.shape)}"
            )
        if packing is not None:
            _check_packing(packing, visual_tokens.shape[0], instruction_tokens.shape[0])
        elif instruction_tokens.shape[0] != visual_tokens.shape[0]:
            raise ShapeError(
                f"visual_tokens and instruction_tokens must have the same batch size; got {visual_tokens.shape[0]} "
                f"and {instruction_tokens.shape[0]}"
            )
        if instruction_mask is None:
            return
        if not isinstance(instruction_mask, Tensor) or instruction_mask.shape != instruction_tokens.shape[:2]:
            actual = list(instruction_mask.shape) if isinstance(instruction_mask, Tensor) else type(instruction_mask)
            raise ShapeError(f"instruction_mask must be {list(instruction_tokens.shape[:2])}; got {actual}")


def _is_grid_of(visual_tokens: Tensor, grid: Grid) -> bool:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        return False
    return min(grid) >= 1 and grid[0] * grid[1] == visual_tokens.shape[1]


def _check_packing(packing: Packing, num_visual_tokens: int, num_instructions: int) -> None:
    if not isinstance(packing, Packing):
        raise ShapeError(f"packing must be an emma_adapter.Packing; got a {type(packing).__name__}")
    announced = sum(packing.lengths)
    if announced != num_visual_tokens:
        raise ShapeError(f"packing announces {announced} visual tokens and there are {num_visual_tokens}")
    if packing.rows.shape != (len(packing.grids),):
        raise ShapeError(
            f"packing.rows must name the instruction of {len(packing.grids)} images; got {list(packing.rows.shape)}"
        )
    # Looking at rows on a GPU would wait for it; there, indexing reports rows that don't exist.
    if packing.rows.device.type == "cpu" and len(packing.grids):
        first, last = packing.rows.aminmax()
        if not 0 <= int(first) <= int(last) < num_instructions:
            raise ShapeError(
                f"packing.rows must name instructions from 0 to {num_instructions - 1}; got {packing.rows.tolist()}"
            )
